"""Dropout, biases, DoRA and several ranks in PEFT's LoRA on expert parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from helpers import assert_close
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch._dynamo.backends.debugging import aot_eager
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from walk import EXPERTS, HIDDEN, TOP_K, build

TOKENS = 9
# One with one operator for the layer; one with biases, transposed weights and an interleaved gate; one without a gate.
CLASSES = [Gemma4TextExperts, GptOssExperts, NemotronHExperts]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "dropout": [{"lora_dropout": 0.4}],
    "bias": [{"lora_bias": True}],
    "bias and dropout": [{"lora_bias": True, "lora_dropout": 0.4}],
    "dora": [{"use_dora": True}],
    "dora and dropout": [{"use_dora": True, "lora_dropout": 0.4, "use_rslora": True}],
    "several": [
        {"lora_bias": True, "r": 2},
        {"use_dora": True, "lora_dropout": 0.3},
        {"lora_dropout": 0.5, "r": 5},
        {"use_dora": True},
        {"r": 1},
    ],
}
# PEFT 0.19 allows one adapter on parameters.
ONE_ADAPTER = Version(peft.__version__) < Version("0.20")
if ONE_ADAPTER:
    del SETTINGS["several"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:lora_bias=True", "ignore:The following .*_pattern keys did not match:RuntimeWarning"
)


class Layer(torch.nn.Module):
    """A module that holds experts, as PEFT sees a model."""

    def __init__(self, experts: Any, implementation: str = "scattermoe") -> None:
        super().__init__()
        self.experts = experts
        experts.config._experts_implementation = implementation

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.experts(*arguments)


def weights_of(experts: Any) -> list[str]:
    return ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]


def adapted(layer: Layer, *adapters: dict[str, Any]) -> Any:
    """PEFT's model of a layer, all adapters active, of random factors, biases and magnitudes."""
    targets = [f"experts.{name}" for name in weights_of(layer.experts)]
    ranks = {"experts.down_proj": 4}
    configs = [
        LoraConfig(target_parameters=targets, **{"r": 3, "lora_alpha": 7, "rank_pattern": ranks, **settings})
        for settings in adapters
    ]
    model = get_peft_model(layer, configs[0])
    names = ["default"]
    for i, config in enumerate(configs[1:]):
        names.append(f"adapter_{i}")
        model.add_adapter(names[-1], config)
    model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices
    x, weights = torch.randn(TOKENS, HIDDEN, dtype=dtype), torch.rand(TOKENS, TOP_K, dtype=dtype)
    return x.requires_grad_(), index, weights.requires_grad_()


def wrapper_of(model: Any, name: str) -> Any:
    return next(m for m in model.modules() if isinstance(m, ParamWrapper) and m.parameter_name == name)


def adapted_linear(model: Any, name: str, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """``[T, K, N_out]`` of ``x`` ``[T, K, N_in]`` or ``[T, 1, N_in]``: every expert's matrices written out.

    The adapters are applied one after another, as PEFT applies them to a linear layer, but for the input of the base
    product, of which nothing is dropped.
    """
    wrapper, e = wrapper_of(model, name), EXPERTS
    base = wrapper.get_base_layer()
    weight = getattr(base, name)
    weight = weight.mT if base.is_transposed else weight
    y = torch.einsum("tki,tkoi->tko", x.expand(*expert.shape, -1), weight[expert])
    for adapter in wrapper.active_adapters:
        a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        a, b = a.view(e, -1, a.shape[1]), b.view(b.shape[0], -1, e).permute(2, 0, 1)
        update = wrapper.scaling[adapter] * b @ a
        dropped = wrapper.lora_dropout[adapter](x)
        y = y + torch.einsum("tki,tkoi->tko", dropped.expand(*expert.shape, -1), update[expert])
        if (bias := wrapper.lora_B[adapter].bias) is not None:
            y = y + wrapper.scaling[adapter] * bias[expert]
        if adapter in wrapper.lora_magnitude_vector:
            norm = (weight + update).norm(dim=-1).detach()
            y = y * (wrapper.lora_magnitude_vector[adapter].weight / norm)[expert]
    return y + getattr(base, f"{name}_bias")[expert] if base.has_bias else y


def reference(model: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    base = wrapper_of(model, "down_proj").get_base_layer()
    up, down = weights_of(base)
    h = adapted_linear(model, up, x.unsqueeze(1), index)
    h = base._apply_gate(h) if base.has_gate else base.act_fn(h)
    return (adapted_linear(model, down, h, index) * weights.unsqueeze(-1)).sum(1)


def with_gradients(
    run: Callable[..., torch.Tensor], model: Any, arguments: tuple[torch.Tensor, ...], seed: int = 0
) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    out = run(*arguments)
    leaves = [arguments[0], arguments[2], *(p for p in model.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out.sin().sum(), leaves)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("cls", CLASSES)
def test_output_and_gradients_are_those_of_every_experts_matrices(
    registered: ModuleType, cls: type[torch.nn.Module], settings: list[dict[str, Any]]
) -> None:
    model, arguments = adapted(Layer(build(cls)), *settings), inputs()
    if len(settings) > 1:
        model.base_model.set_adapter(["default", "adapter_1", "adapter_0", "adapter_2", "adapter_3"])
    # The same seed draws the same masks, for rows of tokens first and of pairs then.
    exact = with_gradients(lambda *a: reference(model, *a), model, arguments)
    assert_close(with_gradients(model, model, arguments), exact, 1e-12)
    model.eval()
    assert_close([model(*arguments)], [reference(model, *arguments)], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing_yet(registered: ModuleType, dtype: torch.dtype) -> None:
    arguments = inputs(dtype)
    for settings in ({"use_dora": True, "lora_dropout": 0.5}, {"lora_bias": True, "lora_dropout": 0.5}):
        config = LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], **settings)
        layer = Layer(build(GptOssExperts, dtype))
        plain = layer(*arguments)
        model = get_peft_model(layer, config)
        # Rounded at other places, if at all.
        assert_close([model(*arguments)], [plain], 2e-6 if dtype == torch.float32 else 2**-6)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)


def test_dropout_is_drawn_anew_and_only_in_training(registered: ModuleType) -> None:
    model, arguments = adapted(Layer(build(Gemma4TextExperts)), {"lora_dropout": 0.5}), inputs()
    assert not torch.equal(model(*arguments), model(*arguments))
    model.eval()
    evaluated = model(*arguments)
    assert torch.equal(model(*arguments), evaluated)
    # Without dropout the factors go into the one operator of the layer, as those of an adapter that never had any.
    for wrapper in (m for m in model.modules() if isinstance(m, ParamWrapper)):
        wrapper.lora_dropout["default"] = torch.nn.Identity()
    assert torch.equal(model.train()(*arguments), evaluated)
    for wrapper in (m for m in model.modules() if isinstance(m, ParamWrapper)):
        wrapper.lora_dropout["default"] = torch.nn.Dropout(1.0)
    with model.disable_adapter():
        base = model(*arguments)
    assert_close([model(*arguments)], [base], 1e-12)


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() & {"dora", "several"}))
@pytest.mark.parametrize("safe", [False, True])
def test_merged_adapters_compute_the_same_and_can_be_taken_out(
    registered: ModuleType, name: str, safe: bool
) -> None:
    settings = SETTINGS[name]
    layer = Layer(build(GptOssExperts))
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    model, arguments = adapted(layer, *settings).eval(), inputs()
    exact = model(*arguments)
    model.merge_adapter(safe_merge=safe)
    assert_close([model(*arguments)], [exact], 1e-12)
    model.unmerge_adapter()
    assert_close([model(*arguments)], [exact], 1e-12)
    if len(settings) > 1:  # one by one
        model.merge_adapter(["default", "adapter_0"], safe_merge=safe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.merge_adapter(["adapter_1", "adapter_2", "adapter_3"], safe_merge=safe)
        assert_close([model(*arguments)], [exact], 1e-12)
        model.unmerge_adapter()
    got = {
        k.replace("base_model.model.", "").replace("base_layer.", ""): p for k, p in model.named_parameters()
    }
    assert_close([got[name] for name in before], list(before.values()), 1e-12)
    assert_close([model.merge_and_unload(safe_merge=safe)(*arguments)], [exact], 1e-12)


def test_what_cannot_be_merged_is_refused_before_anything_is(registered: ModuleType) -> None:
    model = adapted(Layer(build(Gemma4TextExperts)), {"lora_bias": True})
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(
        RuntimeError, match="lora_bias=True, and Gemma4TextExperts has no down_proj_bias to merge it"
    ):
        model.merge_and_unload()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    model = adapted(Layer(build(GptOssExperts)), {"use_dora": True})
    wrapper_of(model, "down_proj").lora_A["default"].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="LoRA on down_proj: merging gives NaN or infinite weights"):
        model.merge_and_unload(safe_merge=True)


def language_model() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("scattermoe")
    return model


def attention_and_experts(**settings: Any) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.down_proj": 6},
        **settings,
    )


def step(model: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    ids = torch.arange(26).view(2, 13) % 64
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"use_dora": True}], ids=["bias", "dora"])
def test_attention_and_experts_train_are_checkpointed_saved_and_loaded(
    registered: ModuleType, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = get_peft_model(language_model(), attention_and_experts(lora_dropout=0.2, **settings)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(step(model)[0])
        optimizer.step()
    assert losses[-1] < losses[0]

    exact = step(model)
    assert len(exact) == 1 + sum(p.requires_grad for p in model.parameters())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert all(torch.equal(g, e) for g, e in zip(step(model), exact, strict=True))

    model.eval()
    ids = torch.arange(26).view(2, 13) % 64
    logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(language_model(), tmp_path, low_cpu_mem_usage=low_memory)
        assert_close([loaded(input_ids=ids).logits], [logits], 1e-6)
    if not ONE_ADAPTER:
        loaded.load_adapter(tmp_path, "second")
        loaded.set_adapter("second")
    assert_close([loaded(input_ids=ids).logits], [logits], 1e-6)
    copied = copy.deepcopy(loaded)
    assert_close([copied(input_ids=ids).logits], [logits], 1e-6)
    if "use_dora" in settings:
        assert_close([copied.merge_and_unload()(input_ids=ids).logits], [logits], 2e-5)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"lora_bias": True}, {"use_dora": True}])
def test_pefts_own_refusals_stay_everywhere_else(kernel: ModuleType, settings: dict[str, Any]) -> None:
    before = ParamWrapper.__init__, ParamWrapper.update_layer
    kernel.register()
    (name,) = settings
    experts = build(GptOssExperts)
    config = LoraConfig(target_parameters=["experts.gate_up_proj"], **settings)
    with pytest.raises(ValueError, match=f"does not work with {name}"):
        get_peft_model(Layer(experts, "eager"), config)
    model = get_peft_model(Layer(experts, "eager"), LoraConfig(target_parameters=["experts.gate_up_proj"]))
    if ONE_ADAPTER:
        with pytest.raises(ValueError, match="only one LoRA adapter"):
            model.add_adapter("second", config)
    elif name == "lora_bias":
        # PEFT does not see this one there, and makes a bias that it never uses; so do we.
        model.add_adapter("second", config)
        model.set_adapter("second")
        before_switch = model(*(arguments := inputs()))
        experts.config._experts_implementation = "scattermoe"
        assert_close([model(*arguments)], [before_switch], 1e-10)
    else:
        with pytest.raises(ValueError, match=f"does not work with {name}|variant combination"):
            model.add_adapter("second", config)
    bias = LoraConfig(target_parameters=["experts.gate_up_proj_bias"], **settings)
    with pytest.raises(
        ValueError, match=f"gate_up_proj_bias does not work with {name}: .* none of the weights"
    ):
        get_peft_model(Layer(build(GptOssExperts)), bias)
    transposed = LoraConfig(target_parameters=["experts.gate_up_proj"], fan_in_fan_out=True, **settings)
    with pytest.raises(ValueError, match="does not work with fan_in_fan_out"):
        get_peft_model(Layer(build(GptOssExperts)), transposed)
    kernel.unregister()
    assert (ParamWrapper.__init__, ParamWrapper.update_layer) == before
    with pytest.raises(ValueError, match=f"does not work with {name}"):
        get_peft_model(Layer(experts), config)


def test_another_implementation_never_leaves_settings_out_in_silence(kernel: ModuleType) -> None:
    kernel.register()
    arguments = inputs()
    model = adapted(Layer(build(GptOssExperts)), {"use_dora": True})
    base = wrapper_of(model, "down_proj").get_base_layer()
    exact = model(*arguments)
    base.config._experts_implementation = "eager"
    with pytest.raises(ValueError, match=r"on down_proj with use_dora: expected .* kernel, .* got 'eager'"):
        model(*arguments)
    kernel.unregister()
    with pytest.raises(ValueError, match="on down_proj with use_dora"):
        model(*arguments)
    assert_close([model.merge_and_unload()(*arguments)], [exact], 1e-10)
    kernel.register()
    dropped = adapted(Layer(build(GptOssExperts)), {"lora_dropout": 0.5})
    wrapper_of(dropped, "down_proj").get_base_layer().config._experts_implementation = "eager"
    with pytest.raises(ValueError, match="with lora_dropout"):
        dropped(*arguments)
    dropped.eval()  # PEFT's own path has all that counts then
    assert_close([dropped(*arguments)], [reference(dropped, *arguments)], 1e-10)
    kernel.unregister()


def test_norms_take_few_matrices_at_a_time(submodule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = submodule("ops.grouped_linear.adapters")
    weight, a, b = torch.randn(7, 6, 5), torch.randn(7, 2, 5), torch.randn(7, 6, 2)
    exact = (weight.double() + b.double() @ a.double()).norm(dim=-1)

    class Stack:
        shape, sizes = weight.shape, []

        def __getitem__(self, chunk: slice) -> torch.Tensor:
            self.sizes.append(weight[chunk].shape[0])
            return weight[chunk]

    monkeypatch.setattr(adapters, "_ELEMENTS", 2 * 6 * 5)
    assert_close([adapters.row_norms(Stack(), a, b)], [exact], 1e-6)
    assert Stack.sizes == [2, 2, 2, 1]
    narrow = adapters.row_norms(weight.bfloat16(), a.bfloat16(), b)
    assert narrow.dtype == torch.float32
    assert_close([narrow], [exact], 2**-7)
    weight[0, 0] = -(b[0, 0] @ a[0])
    assert 0 < adapters.row_norms(weight, a, b)[0, 0] < 1e-2  # a divisor, whatever cancels


def test_one_graph_for_every_batch_size(registered: ModuleType) -> None:
    model = adapted(Layer(build(Gemma4TextExperts, torch.float32)), {"use_dora": True, "lora_dropout": 0.4})
    graphs = []

    def counting(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, example)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counting)
    counts = []
    for tokens in (5, 8, 17):
        index = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
        arguments = (
            torch.randn(tokens, HIDDEN, requires_grad=True),
            index,
            torch.rand(tokens, TOP_K).requires_grad_(),
        )
        got = with_gradients(compiled, model, arguments)
        counts.append(len(graphs))
        assert_close(got, with_gradients(model, model, arguments), 1e-5)
    assert counts[0] == counts[-1]
