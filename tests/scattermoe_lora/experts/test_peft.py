"""PEFT's LoRA on expert parameters runs fused: same numbers, nothing merged."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from helpers import Shape, assert_close, experts_module, route
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from walk import build, experts_classes

REPOSITORY = Path(__file__).resolve().parents[3]
SHAPE = Shape(tokens=9, experts=4, top_k=2, hidden=32, intermediate=24, rank=3)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


class Layer(torch.nn.Module):
    """A module that holds experts, as PEFT sees a model."""

    def __init__(self, shape: Shape = SHAPE, dtype: torch.dtype = torch.float32, experts: Any = None) -> None:
        super().__init__()
        self.experts = experts_module(shape, dtype=dtype) if experts is None else experts

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.experts(*arguments)


def adapted(config: LoraConfig, layer: Layer | None = None) -> Any:
    return get_peft_model(layer or Layer(), config)


def lora(targets: list[str] = BOTH, **settings: Any) -> LoraConfig:
    # The usual start, B = 0, would leave A without a gradient and the output without a trace of either.
    return LoraConfig(
        **{"r": 3, "lora_alpha": 6, "init_lora_weights": False, **settings}, target_parameters=targets
    )


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(SHAPE.tokens, SHAPE.hidden).to(dtype).requires_grad_()
    return x, route(SHAPE), torch.rand(SHAPE.tokens, SHAPE.top_k).to(dtype).requires_grad_()


def run(model: Any, implementation: str, arguments: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Output and the gradients of inputs and trainable parameters."""
    base = next(m for m in model.modules() if type(m).__name__ == "Gemma4TextExperts")
    base.config._experts_implementation = implementation
    out = model(*arguments)
    leaves = [arguments[0], arguments[2], *(p for p in model.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out.sin().sum(), leaves)]


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(BOTH[:1]),
        lora(BOTH[1:]),
        *(lora(r=r) for r in (1, 2, 16, 40, 256)),
        lora(use_rslora=True, r=16),
        lora(lora_alpha=0),
        lora(lora_alpha=3),
    ],
    ids=["both", "gate_up", "down", "r=1", "r=2", "r=16", "r=40", "r=256", "rslora", "alpha=0", "alpha=r"],
)
def test_output_and_gradients_are_those_of_pefts_own_path(registered: ModuleType, config: LoraConfig) -> None:
    model, arguments = adapted(config), inputs()
    assert_close(run(model, "scattermoe", arguments), run(model, "eager", arguments), 2e-5)


# PEFT looks for the keys among the targeted modules only, and says that it ignores those of parameters; it does not.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_ranks_and_alphas_by_pattern(registered: ModuleType) -> None:
    config = lora(rank_pattern={"experts.down_proj": 5}, alpha_pattern={"experts.gate_up_proj": 11})
    model, arguments = adapted(config), inputs()
    wrappers = {m.parameter_name: m for m in model.modules() if hasattr(m, "parameter_name")}
    assert {name: (m.r["default"], m.lora_alpha["default"]) for name, m in wrappers.items()} == {
        "gate_up_proj": (3, 11),
        "down_proj": (5, 6),
    }
    assert_close(run(model, "scattermoe", arguments), run(model, "eager", arguments), 2e-5)


def test_float32_adapters_over_a_bfloat16_base(registered: ModuleType) -> None:
    model, arguments = adapted(lora(), Layer(dtype=torch.bfloat16)), inputs(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    exact = copy.deepcopy(model).double()
    wide = tuple(a.detach().double().requires_grad_() if a.is_floating_point() else a for a in arguments)
    truth = run(exact, "eager", wide)
    ours, theirs = run(model, "scattermoe", arguments), run(model, "eager", arguments)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for o, t, true in zip(ours, theirs, truth, strict=True):
        assert (o.double() - true).norm() <= 1.1 * (t.double() - true).norm()


def test_bfloat16_adapters_over_a_float32_base(registered: ModuleType) -> None:
    # lora_alpha=7 of r=3: a scaling that bfloat16 does not multiply by without rounding.
    model, arguments = adapted(lora(lora_alpha=7)), inputs()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    ours, theirs = run(model, "scattermoe", arguments), run(model, "eager", arguments)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert_close(ours[:3], theirs[:3], 2e-5)
    assert_close(ours[3:], theirs[3:], 2**-7)


# PEFT 0.19 allows one adapter on parameters.
several_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"),
    reason="PEFT before 0.20 refuses a second adapter on parameters",
)


def test_float32_adapters_over_a_bfloat16_base_under_autocast(registered: ModuleType) -> None:
    model, arguments = adapted(lora(), Layer(dtype=torch.bfloat16)), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = run(model, "scattermoe", arguments), run(model, "grouped_mm", arguments)
    exact = copy.deepcopy(model).double()
    wide = tuple(a.detach().double().requires_grad_() if a.is_floating_point() else a for a in arguments)
    truth = run(exact, "eager", wide)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for o, t, true in zip(ours, theirs, truth, strict=True):
        assert (o.double() - true).norm() <= 1.1 * (t.double() - true).norm()


@pytest.mark.parametrize("train", [False, True])
def test_autocast_over_float32_weights_keeps_their_precision(registered: ModuleType, train: bool) -> None:
    model, arguments = adapted(lora()), inputs()
    exact = run(model, "scattermoe", arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(train):
        got = run(model, "scattermoe", arguments) if train else [model(*arguments)]
    assert_close(got, exact[: len(got)], 2e-5)


@several_adapters
def test_adapters_switch_and_add_up(registered: ModuleType) -> None:
    model, arguments = adapted(lora()), inputs()
    model.add_adapter("second", lora(r=7, use_rslora=True))
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        assert_close(run(model, "scattermoe", arguments), run(model, "eager", arguments), 2e-5)


def test_disabled_merged_and_unmerged_adapters(registered: ModuleType) -> None:
    layer = Layer()
    arguments = inputs()
    plain = layer(*arguments)
    model = adapted(lora(), layer)
    active = run(model, "scattermoe", arguments)[0]
    assert not torch.allclose(active, plain)
    with model.disable_adapter():
        assert_close([model(*arguments)], [plain], 1e-6)
    model.merge_adapter()
    with torch.no_grad():
        assert_close([model(*arguments)], [active], 2e-5)
    with model.disable_adapter():  # PEFT unmerges for it
        assert_close([model(*arguments)], [plain], 2e-5)
    assert_close([run(model, "scattermoe", arguments)[0]], [active], 2e-5)


def test_saved_loaded_and_merged_models_agree(registered: ModuleType, tmp_path: Path) -> None:
    layer = Layer()
    base = copy.deepcopy(layer)
    model, arguments = adapted(lora(), layer), inputs()
    before = run(model, "scattermoe", arguments)[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert_close([run(loaded, "scattermoe", arguments)[0]], [before], 1e-6)
    loaded.load_adapter(tmp_path, "default", is_trainable=True)
    assert_close([run(loaded, "scattermoe", arguments)[0]], [before], 1e-6)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert_close([merged(*arguments)], [before], 2e-5)


class Largest(TorchDispatchMode):
    """Notes the largest storage that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


class Written(TorchDispatchMode):
    """Notes the operators that compute or copy a tensor of ``elements`` or more."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        computes = str(func).split(".")[1] in ("mul", "_to_copy", "clone", "copy_", "cat")
        if computes and result.numel() >= self.elements:
            self.operators.append(str(func))
        return result


# Few tokens, large weights: whatever has the size of a weight stands out.
SPARSE = Shape(tokens=2, experts=16, top_k=1, hidden=64, intermediate=48, rank=1)


CLASSES = experts_classes()
LAYOUTS = ["Gemma4TextExperts", "GptOssExperts", "AriaExperts", "NemotronHExperts", "MuseSparkExperts"]


def sparse_step(name: str, implementation: str, **settings: Any) -> tuple[int, int]:
    """Elements of the largest tensor that an operator makes, and of the smaller weight."""
    base = build(CLASSES[name], torch.float32, experts=16, hidden=64, intermediate=48)
    weights = [key for key, parameter in base.named_parameters() if parameter.dim() == 3]
    base.config._experts_implementation = implementation
    model = adapted(lora([f"experts.{key}" for key in weights], r=1, **settings), Layer(experts=base))
    x, routing_weights = torch.randn(2, 64, requires_grad=True), torch.rand(2, 1)
    with Largest() as largest:
        model(x, route(SPARSE), routing_weights).sum().backward()
    return largest.elements, min(getattr(base, key).numel() for key in weights)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_operator_makes_a_tensor_of_a_weights_size(registered: ModuleType, name: str) -> None:
    largest, weight = sparse_step(name, "scattermoe")
    assert largest < weight / 4
    largest, weight = sparse_step(name, "scattermoe", use_dora=True, lora_dropout=0.5)
    assert largest < weight / 4
    largest, weight = sparse_step(name, "grouped_mm")
    assert largest >= weight  # the watch sees what PEFT's own path merges


@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_inside_the_operators_has_a_weights_size(
    kernel: ModuleType, submodule: Any, transposed: bool
) -> None:
    # A custom operator is one call to the mode above; its insides are watched by calling them as functions.
    cpu, routing = submodule("ops.experts.cpu"), submodule("ops.routing")
    gate = submodule("ops.activation").Gate("silu", limit=1.0)
    sizes = ((96, 64), (64, 48))
    up, down = (torch.randn(16, *(size[::-1] if transposed else size)) for size in sizes)
    if transposed:
        up, down = up.mT, down.mT
    factors = (torch.randn(16, *s) for s in ((1, 64), (96, 1), (1, 48), (64, 1)))
    biases = (torch.randn(16, 96), torch.randn(16, 64))
    x, weights = torch.randn(2, 64), torch.rand(2, 1)
    order, offsets = routing.sort_by_expert(route(SPARSE), 16)
    arguments = submodule("ops.experts.arguments")
    operands = arguments.Operands(x, up, down, weights, *factors, *biases, order, offsets)
    names = [name for name in operands._fields[:10] if name not in ("gate_up", "down")]
    with Largest() as largest:
        out, *kept = cpu.forward(operands, gate, True)
        cpu.backward(out, operands, arguments.Kept(*kept), gate, names)
    assert largest.elements < down.numel() / 4


since_peft_0_20 = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"), reason="PEFT before 0.20 fails on it in its own path"
)


@since_peft_0_20
def test_a_targeted_bias_runs_through_pefts_own_path_with_one_warning(registered: ModuleType) -> None:
    base = build(CLASSES["GptOssExperts"], torch.float32)
    targets = ["experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj"]
    model = adapted(lora(targets), Layer(experts=base))
    x, weights = torch.randn(5, 24, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    index = torch.rand(5, 4).topk(2).indices
    results = []
    for implementation in ("eager", "scattermoe", "scattermoe"):
        base.config._experts_implementation = implementation
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = model(x, index, weights)
        leaves = [x, weights, *(p for p in model.parameters() if p.requires_grad)]
        results.append(
            ([out, *torch.autograd.grad(out.sin().sum(), leaves)], [str(w.message) for w in caught])
        )
    assert_close(results[1][0], results[0][0], 2e-5)
    assert [len(messages) for _, messages in results] == [0, 1, 0]
    assert "gate_up_proj_bias is none of the weights gate_up_proj and down_proj" in results[1][1][0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("name", ["Gemma4TextExperts", "GptOssExperts"])
def test_one_token_decodes_with_the_factors_of_its_experts_alone(
    registered: ModuleType, name: str, dtype: torch.dtype
) -> None:
    base = build(CLASSES[name], torch.float32, experts=16)
    model = adapted(lora(), Layer(experts=base))
    x, index, weights = torch.randn(2, 24), torch.tensor([[3, 11], [11, 0]]), torch.rand(2, 2)
    base.config._experts_implementation = "eager"
    exact = model(x, index, weights)
    base.config._experts_implementation = "scattermoe"
    with torch.no_grad(), Written(16 * 24 * 3) as written:
        got = model(x, index.to(dtype), weights)
    assert_close([got], [exact], 2e-5)
    # Nothing touches the factors of all 16 experts, 16 * 24 * 3 numbers at the least.
    assert not written.operators


@pytest.mark.filterwarnings("error:scattermoe")
@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
def test_float8_weights_are_refused_without_a_promise_to_run(registered: ModuleType, target: str) -> None:
    model, arguments = adapted(lora([f"experts.{target}"])), inputs()
    base = model.get_base_model().experts.get_base_layer()
    for name in ("gate_up_proj", "down_proj"):
        narrow = getattr(base, name).detach().to(torch.float8_e4m3fn)
        setattr(base, name, torch.nn.Parameter(narrow, requires_grad=False))
    with pytest.raises(NotImplementedError, match=f"LoRA on {target}: expected .*, got torch.float8_e4m3fn"):
        run(model, "scattermoe", arguments)


@since_peft_0_20
def test_a_single_expert(registered: ModuleType) -> None:
    shape = Shape(tokens=9, experts=1, top_k=1, hidden=32, intermediate=24, rank=3)
    x = torch.randn(9, 32, requires_grad=True)
    arguments = (x, torch.zeros(9, 1, dtype=torch.long), torch.rand(9, 1, requires_grad=True))
    model = adapted(lora(), Layer(shape))
    assert_close(run(model, "scattermoe", arguments), run(model, "eager", arguments), 2e-5)


def test_without_registration_peft_is_untouched(kernel: ModuleType) -> None:
    from peft.tuners.lora.layer import ParamWrapper

    before = ParamWrapper.forward
    kernel.register()
    assert ParamWrapper.forward is not before
    kernel.unregister()
    assert ParamWrapper.forward is before


@pytest.mark.parametrize("first", [0, 1])
def test_two_builds_leave_peft_untouched_whichever_goes_first(
    kernel: ModuleType, tmp_path: Path, first: int
) -> None:
    from kernelpress.builder.build import build as build_package
    from kernelpress.spec.load import load_spec
    from kernels import get_local_kernel
    from peft.tuners.lora.layer import ParamWrapper

    shutil.copytree(
        REPOSITORY / "torch-ext", tmp_path / "torch-ext", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("build.toml", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    with (tmp_path / "torch-ext/scattermoe_lora/ops/routing.py").open("a") as source:
        source.write("# another build\n")
    build_package(load_spec(tmp_path), tmp_path / "build")
    other = get_local_kernel(tmp_path / "build")
    assert other.__name__ != kernel.__name__

    before = ParamWrapper.forward
    kernel.register("one")
    other.register("two")
    model, arguments = adapted(lora()), inputs()
    exact = run(model, "eager", arguments)
    for name in ("one", "two"):
        assert_close(run(model, name, arguments), exact, 2e-5)
    left = (kernel, other)[first]
    (other, kernel)[first].unregister()
    assert ParamWrapper.forward is not before
    assert_close(run(model, ("one", "two")[first], arguments), exact, 2e-5)
    left.unregister()
    assert ParamWrapper.forward is before


def test_no_tokens_at_all(registered: ModuleType) -> None:
    model = adapted(lora())
    base = next(m for m in model.modules() if type(m).__name__ == "Gemma4TextExperts")
    base.config._experts_implementation = "scattermoe"
    with torch.no_grad():
        out = model(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert out.shape == (0, 32)


def test_adapters_by_sample_are_refused_and_none_is_no_such_thing(registered: ModuleType) -> None:
    model, arguments = adapted(lora()), inputs()
    base = next(m for m in model.modules() if type(m).__name__ == "Gemma4TextExperts")
    base.config._experts_implementation = "scattermoe"
    experts = model.get_base_model().experts
    assert torch.equal(experts(*arguments, adapter_names=None), experts(*arguments))
    with pytest.raises(ValueError, match="adapter"):
        experts(*arguments, adapter_names=["default"] * 9)


def test_other_implementations_take_pefts_own_path(
    registered: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.layer import ParamWrapper

    calls = []
    activate = ParamWrapper._activate_lora
    monkeypatch.setattr(
        ParamWrapper, "_activate_lora", lambda self, names: calls.append(1) or activate(self, names)
    )
    model, arguments = adapted(lora()), inputs()
    run(model, "scattermoe", arguments)
    assert not calls
    run(model, "grouped_mm", arguments)
    assert len(calls) == 2
