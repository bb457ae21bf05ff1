"""Experts modules whose weights are quantized, held to the same modules with the dense weights that codes stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from helpers import Shape, assert_close, experts_module, low_rank, route
from peft import LoraConfig, inject_adapter_in_model

SHAPE = Shape(tokens=9, experts=4, top_k=2, hidden=64, intermediate=32, rank=3)
WEIGHTS = ("gate_up_proj", "down_proj")


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(SHAPE.tokens, SHAPE.hidden, requires_grad=True)
    return x, route(SHAPE), torch.rand(SHAPE.tokens, SHAPE.top_k, requires_grad=True)


def factors() -> dict[str, Any]:
    shapes = {
        "gate_up_proj": (2 * SHAPE.intermediate, SHAPE.hidden),
        "down_proj": (SHAPE.hidden, SHAPE.intermediate),
    }
    return {
        name: tuple(t.requires_grad_() for t in low_rank(SHAPE.experts, n_out, n_in, SHAPE.rank))
        for name, (n_out, n_in) in shapes.items()
    }


def run(forward: Callable[..., torch.Tensor], x: torch.Tensor, *rest: Any, lora: Any) -> list[torch.Tensor]:
    out = forward(x, *rest, lora=lora)
    leaves = [x, rest[1], *(factor for pair in lora.values() for factor in pair)]
    return [out, *torch.autograd.grad(out.sin().sum(), leaves)]


def dense_experts(submodule: Any, module: Any) -> Any:
    """Experts of the dense weights that a module's codes stand for."""
    read = submodule("integration.experts.quantized.read").read_stack
    decode = submodule("ops.quantization.reference").decode
    dense = experts_module(SHAPE)
    for name in WEIGHTS:
        setattr(dense, name, torch.nn.Parameter(decode(read(module, name)).float(), requires_grad=False))
    return dense


def assert_computes_as_dense(kernel: ModuleType, submodule: Any, module: Any) -> None:
    """Output and gradients of the dense experts, with LoRA, also when compiled; and no warning."""
    dense, arguments, lora = dense_experts(submodule, module), inputs(), factors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run(lambda *a, lora: kernel.experts_forward(module, *a, lora), *arguments, lora=lora)
    expected = run(lambda *a, lora: kernel.experts_forward(dense, *a, lora), *arguments, lora=lora)
    assert_close(got, expected, 2e-5)
    torch._dynamo.reset()
    compiled = torch.compile(kernel.experts_forward, fullgraph=True, backend="aot_eager")
    again = run(lambda *a, lora: compiled(module, *a, lora), *arguments, lora=lora)
    assert_close(again, got, 1e-6)


class Layer(torch.nn.Module):
    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.experts(*arguments)


def assert_adapts_as_dense(submodule: Any, module: Any) -> None:
    """PEFT's adapters on the module have the output and gradients of those on the dense experts."""
    dense = dense_experts(submodule, module)
    module.config._experts_implementation = dense.config._experts_implementation = "scattermoe"
    settings = LoraConfig(
        r=3, init_lora_weights=False, target_parameters=[f"experts.{name}" for name in WEIGHTS]
    )
    arguments, results = inputs(), []
    for experts in (module, dense):
        torch.manual_seed(1)
        layer = inject_adapter_in_model(settings, Layer(experts))
        parameters = {name: p for name, p in layer.named_parameters() if "lora_" in name}
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        out = layer(*arguments)
        names = sorted(parameters)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [parameters[name] for name in names])])
    assert_close(*results, 2e-5)
