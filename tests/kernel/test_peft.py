"""PEFT's LoRA on expert parameters runs fused: same numbers, nothing merged."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close, experts_module, route
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = Shape(tokens=9, experts=4, top_k=2, hidden=32, intermediate=24, rank=3)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


class Layer(torch.nn.Module):
    """What PEFT sees of a model: a module that holds experts."""

    def __init__(self, shape: Shape = SHAPE, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.experts = experts_module(shape, dtype=dtype)

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
    model.get_base_model().experts.get_submodule("")  # the outermost wrapper, whatever is nested in it
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
        lora(r=1),
        lora(r=40),
        lora(use_rslora=True),
        lora(rank_pattern={"experts.down_proj": 5}, alpha_pattern={"experts.gate_up_proj": 11}),
    ],
    ids=["both", "gate_up", "down", "r=1", "r=40", "rslora", "patterns"],
)
def test_output_and_gradients_are_those_of_pefts_own_path(registered: ModuleType, config: LoraConfig) -> None:
    model, arguments = adapted(config), inputs()
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


def test_adapters_switch_and_add_up(registered: ModuleType) -> None:
    model, arguments = adapted(lora()), inputs()
    model.add_adapter("second", lora(r=3))
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        assert_close(run(model, "scattermoe", arguments), run(model, "eager", arguments), 2e-5)


def test_disabled_merged_and_unmerged_adapters(registered: ModuleType) -> None:
    model, arguments = adapted(lora()), inputs()
    with model.disable_adapter(), torch.no_grad():
        model(*arguments)
        disabled = model(*arguments)
    assert_close([disabled], [Layer.forward(model.get_base_model(), *arguments)], 10.0)  # same shape, finite
    assert disabled.isfinite().all()
    active = run(model, "scattermoe", arguments)[0]
    assert not torch.allclose(active, disabled)
    model.merge_adapter()
    with torch.no_grad():
        assert_close([model(*arguments)], [active], 2e-5)
    model.unmerge_adapter()
    assert_close([run(model, "scattermoe", arguments)[0]], [active], 2e-5)


def test_saved_loaded_and_merged_models_agree(registered: ModuleType, tmp_path: Path) -> None:
    layer = Layer()
    base = copy.deepcopy(layer)
    model, arguments = adapted(lora(), layer), inputs()
    before = run(model, "scattermoe", arguments)[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert_close([run(loaded, "scattermoe", arguments)[0]], [before], 1e-6)
    merged = model.merge_and_unload()
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


# Few tokens, large weights: whatever has the size of a weight stands out.
SPARSE = Shape(tokens=2, experts=16, top_k=1, hidden=64, intermediate=48, rank=1)


def sparse_step(implementation: str) -> int:
    model = adapted(lora(r=1), Layer(SPARSE))
    base = next(m for m in model.modules() if type(m).__name__ == "Gemma4TextExperts")
    base.config._experts_implementation = implementation
    x, weights = torch.randn(2, 64, requires_grad=True), torch.rand(2, 1)
    with Largest() as largest:
        model(x, route(SPARSE), weights).sum().backward()
    return largest.elements


def test_no_operator_makes_a_tensor_of_a_weights_size(registered: ModuleType) -> None:
    smaller_weight = SPARSE.experts * SPARSE.hidden * SPARSE.intermediate
    assert sparse_step("scattermoe") < smaller_weight / 4
    assert sparse_step("grouped_mm") >= smaller_weight  # the watch sees what PEFT's own path merges


def test_nothing_inside_the_operators_has_a_weights_size(kernel: ModuleType, submodule: Any) -> None:
    # A custom operator is one call to the mode above; its insides are watched by calling them as functions.
    cpu, routing = submodule("ops.experts.cpu"), submodule("ops.routing")
    module = experts_module(SPARSE).requires_grad_(False)
    a1, b1, a2, b2 = (torch.randn(16, *s) for s in ((1, 64), (96, 1), (1, 48), (64, 1)))
    x, weights = torch.randn(2, 64), torch.rand(2, 1)
    gate = submodule("ops.activation").Gate("silu")
    order, offsets = routing.sort_by_expert(route(SPARSE), 16)
    base = (module.gate_up_proj, module.down_proj, weights, order, offsets, a1, b1, a2, b2, None, None, gate)
    with Largest() as largest:
        out, *kept = cpu.forward(x, *base, True)
        cpu.backward(out, x, *kept, *base, [True, False, False, *[True] * 5, False, False])
    assert largest.elements < module.down_proj.numel() / 4


def test_without_registration_peft_is_untouched(kernel: ModuleType) -> None:
    from peft.tuners.lora.layer import ParamWrapper

    before = ParamWrapper.forward
    kernel.register()
    assert ParamWrapper.forward is not before
    kernel.unregister()
    assert ParamWrapper.forward is before


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
