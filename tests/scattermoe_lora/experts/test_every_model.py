"""Every experts class in transformers, with and without LoRA, computes and trains as in eager mode."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_close
from peft import LoraConfig, inject_adapter_in_model
from walk import EXPERTS, HIDDEN, TOP_K, build, experts_classes

CLASSES = experts_classes()
TOKENS = 9
# Some classes round to float32 on their way in eager mode.
TOLERANCE = 2e-6


class Layer(torch.nn.Module):
    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.experts = experts


class Exported(Layer):
    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.experts(*arguments)


def adapt(experts: Any) -> Layer:
    weights = [name for name, parameter in experts.named_parameters() if parameter.dim() == 3]
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        init_lora_weights=False,
        target_parameters=[f"experts.{name}" for name in weights],
    )
    layer = inject_adapter_in_model(config, Layer(experts))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return layer


def run(
    layer: Layer, base: Any, implementation: str, index: torch.Tensor, x: torch.Tensor, weights: torch.Tensor
) -> list[torch.Tensor]:
    base.config._experts_implementation = implementation
    out = layer.experts(x, index, weights)
    leaves = [x, weights, *(p for p in layer.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out.sin().sum(), leaves)]


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(TOKENS, TOP_K, dtype=torch.float64, requires_grad=True)
    return torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices, x, weights


def test_the_walk_finds_what_transformers_decorates() -> None:
    assert {"Gemma4TextExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts"} <= set(CLASSES)
    assert len(CLASSES) >= 60


@pytest.mark.parametrize("name", CLASSES)
def test_output_and_gradients_are_those_of_eager(registered: ModuleType, name: str) -> None:
    layer = Layer(build(CLASSES[name]))
    arguments = (layer, layer.experts)
    index, x, weights = inputs()
    exact = run(*arguments, "eager", index, x, weights)
    assert_close(run(*arguments, "scattermoe", index, x, weights), exact, TOLERANCE)


@pytest.mark.parametrize("name", CLASSES)
def test_with_lora_output_and_gradients_are_those_of_pefts_own_path(
    registered: ModuleType, name: str
) -> None:
    base = build(CLASSES[name])
    layer = adapt(base)
    index, x, weights = inputs()
    exact = run(layer, base, "eager", index, x, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would say that PEFT's own path ran
        assert_close(run(layer, base, "scattermoe", index, x, weights), exact, TOLERANCE)


@pytest.mark.parametrize("name", CLASSES)
def test_sentinels_of_expert_parallelism_contribute_nothing(registered: ModuleType, name: str) -> None:
    layer = Layer(build(CLASSES[name]))
    arguments = (layer, layer.experts)
    index, x, weights = inputs()
    here = torch.rand(index.shape) < 2 / 3
    # Eager mode of some classes knows no sentinels: for it, a weight of zero.
    exact = run(*arguments, "eager", index, x, (weights * here).detach().requires_grad_())
    layer.experts._is_expert_parallel = True
    got = run(*arguments, "scattermoe", index.masked_fill(~here, EXPERTS), x, weights)
    # A pair that runs nowhere here passes its routing weight no gradient.
    assert (got[2][~here] == 0).all()
    got[2], exact[2] = got[2] * here, exact[2] * here
    assert_close(got, exact, TOLERANCE)


@pytest.mark.parametrize("name", CLASSES)
def test_an_index_outside_the_experts_is_an_error(registered: ModuleType, name: str) -> None:
    layer = Layer(build(CLASSES[name]))
    index, x, weights = inputs()
    index[3, 1] = EXPERTS
    with pytest.raises(ValueError, match=r"expected values < 4 .* got 1 larger"):
        run(layer, layer.experts, "scattermoe", index, x, weights)


def test_a_gate_is_fused_where_it_is_one_of_the_known(registered: ModuleType, submodule: Any) -> None:
    fused_gate = submodule("integration.experts.module").fused_gate
    gates = {name: fused_gate(build(cls)) for name, cls in CLASSES.items()}
    composed = {name for name, gate in gates.items() if gate is None}
    # No gate at all; a norm behind the experts; a gate that computes in float32 whatever its input.
    assert {"NemotronHExperts", "MuseSparkExperts", "BeamExperts"} <= composed
    assert len(composed) < len(CLASSES) / 4
    gpt_oss = gates["GptOssExperts"]
    assert (gpt_oss.interleaved, gpt_oss.limit, gpt_oss.shift) == (True, 7.0, 1.0)
    assert gpt_oss.alpha == pytest.approx(1.702)
    assert gates["DeepseekV4Experts"].shift == 0.0


def test_a_gate_that_only_looks_like_gpt_oss_is_not_taken_for_it(submodule: Any) -> None:
    class Different(CLASSES["GptOssExperts"]):  # type: ignore[misc]
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return super()._apply_gate(gate_up) + 1e-3

    module = build(CLASSES["GptOssExperts"])
    fused_gate = submodule("integration.experts.module").fused_gate
    assert fused_gate(module) is not None
    module.__class__ = Different
    assert fused_gate(module) is None


@pytest.mark.parametrize("name", ["GptOssExperts", "DeepseekV4Experts"])
def test_a_layer_with_a_clamped_gate_is_exported_before_it_ever_ran(
    registered: ModuleType, name: str
) -> None:
    base = build(CLASSES[name], torch.float32)
    base.config._experts_implementation = "scattermoe"
    index, x, weights = (t.detach() for t in inputs())
    arguments = (x.float(), index, weights.float())
    program = torch.export.export(Exported(base), arguments)
    assert any("experts_forward" in str(node.target) for node in program.graph.nodes)
    assert_close([program.module()(*arguments)], [base(*arguments)], 1e-6)


@pytest.mark.parametrize("name", ["GptOssExperts", "DeepseekV4Experts"])
def test_a_clamped_gate_on_the_meta_device_gives_shapes(registered: ModuleType, name: str) -> None:
    with torch.device("meta"):
        base = build(CLASSES[name], torch.float32)
        base.config._experts_implementation = "scattermoe"
        x, index = torch.empty(TOKENS, HIDDEN), torch.empty(TOKENS, TOP_K, dtype=torch.int64)
        out = base(x, index, torch.empty(TOKENS, TOP_K))
        out.sum().backward()
    assert out.shape == x.shape
    assert base.down_proj.grad.shape == base.down_proj.shape


def test_a_gate_that_refuses_numbers_of_another_dtype_runs_as_it_is(submodule: Any) -> None:
    class Narrow(CLASSES["GptOssExperts"]):  # type: ignore[misc]
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return super()._apply_gate(gate_up) @ torch.eye(gate_up.shape[-1] // 2, dtype=torch.float32)

    module = build(CLASSES["GptOssExperts"], torch.float32)
    module.__class__ = Narrow
    assert submodule("integration.experts.module").fused_gate(module) is None


def test_two_modules_of_a_class_may_differ_in_their_gate(submodule: Any) -> None:
    class Shifted(CLASSES["Qwen3MoeExperts"]):  # type: ignore[misc]
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, -1)
            return self.act_fn(gate) * (up + self.up_shift)

    fused_gate = submodule("integration.experts.module").fused_gate
    for shift, known in ((1.0, True), (0.25, False), (0.0, True)):
        module = build(CLASSES["Qwen3MoeExperts"])
        module.__class__, module.up_shift = Shifted, shift
        gate = fused_gate(module)
        assert (gate is not None) == known
        assert gate is None or gate.shift == shift


@pytest.mark.parametrize(("limit", "plain"), [(0.0, True), (10.0, False), (1e3, False)])
def test_a_clamp_is_seen_wherever_it_is_and_whatever_it_is_called(
    submodule: Any, limit: float, plain: bool
) -> None:
    class Clipped(CLASSES["Qwen3MoeExperts"]):  # type: ignore[misc]
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, -1)
            return self.act_fn(gate.clamp(max=self.largest) if self.largest else gate) * up

    module = build(CLASSES["Qwen3MoeExperts"])
    module.__class__, module.largest = Clipped, limit
    assert (submodule("integration.experts.module").fused_gate(module) is not None) == plain


@pytest.mark.parametrize("name", ["DeepseekV4Experts", "GptOssExperts"])
def test_a_limit_of_zero_is_what_the_class_makes_of_it(submodule: Any, name: str) -> None:
    module = build(CLASSES[name])
    module.limit = 0.0
    gate = submodule("integration.experts.module").fused_gate(module)
    h = 3 * torch.randn(4, 32, dtype=torch.float64)
    if gate is not None:
        assert_close([submodule("ops.activation").apply(gate, h)], [module._apply_gate(h)], 1e-9)


LAYOUTS = [
    "AriaExperts",
    "BeamExperts",
    "DeepseekV4Experts",
    "GptOssExperts",
    "MuseSparkExperts",
    "NemotronHExperts",
    "OpenAIPrivacyFilterExperts",
    "Qwen3MoeExperts",
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_bfloat16_is_as_close_to_the_truth_as_eager(registered: ModuleType, name: str) -> None:
    module = build(CLASSES[name])
    index = torch.rand(300, EXPERTS).topk(TOP_K).indices
    x, weights = torch.randn(300, HIDDEN), torch.rand(300, TOP_K)
    # Eager mode of this class computes in float32 whatever its dtype; transformers' other implementations do not.
    yardstick = "grouped_mm" if name == "OpenAIPrivacyFilterExperts" else "eager"
    results = []
    for implementation, dtype in (
        ("eager", torch.float64),
        ("scattermoe", torch.bfloat16),
        (yardstick, torch.bfloat16),
    ):
        # The truth is of the rounded weights and inputs.
        layer = Layer(module.to(torch.bfloat16).to(dtype))
        leaves = (t.bfloat16().to(dtype).requires_grad_() for t in (x, weights))
        results.append(run(layer, layer.experts, implementation, index, *leaves))
    for true, ours, theirs in zip(*results, strict=True):
        assert (ours.double() - true).norm() <= 1.1 * (theirs.double() - true).norm()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layer_that_gets_no_tokens_gives_none_back(registered: ModuleType, name: str) -> None:
    # As with token dispatch, where a process may get none: its weights' gradients are waited for all the same.
    layer = Layer(build(CLASSES[name]))
    x = torch.empty(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = torch.empty(0, TOP_K, dtype=torch.float64, requires_grad=True)
    index = torch.empty(0, TOP_K, dtype=torch.int64)
    out, *gradients = run(layer, layer.experts, "scattermoe", index, x, weights)
    assert out.shape == gradients[0].shape == x.shape
    assert not any(gradient.any() for gradient in gradients)
