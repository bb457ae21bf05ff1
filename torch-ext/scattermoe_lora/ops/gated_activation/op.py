"""A gated activation as a torch operator, with a fake implementation and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..operator import computation, eager, register_autograd
from . import cpu


def _implementation(x: torch.Tensor) -> Any:
    if dispatch.use_triton(x):
        from . import gpu

        return gpu
    return cpu


@torch.library.custom_op("scattermoe_lora::gated_activation_forward", mutates_args=())
@computation
def gated_activation_forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """``act(gate) * up``; in float16 the product is clamped.

    Args:
        gate, up: ``[*, I]``, any strides.
        activation: One of :data:`scattermoe_lora.ops.activation.ACTIVATIONS`.

    Returns:
        ``[*, I]``, contiguous.
    """
    result: torch.Tensor = _implementation(gate).forward(gate, up, activation)
    return result


@gated_activation_forward.register_fake
def _(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("scattermoe_lora::gated_activation_backward", mutates_args=())
@computation
def gated_activation_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``gate`` and ``up``, contiguous; in float16 0 where something was clamped."""
    gradients: tuple[torch.Tensor, torch.Tensor] = _implementation(gate).backward(dy, gate, up, activation)
    return gradients


@gated_activation_backward.register_fake
def _(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_gradients(dy, *ctx.saved_tensors, ctx.activation), None


_gradients = eager(gated_activation_backward)
forward = register_autograd(gated_activation_forward, _backward, _setup_context)
dispatch.refuse_second_derivative("gated_activation", gated_activation_backward)
