"""RMSNorm with rotary embedding as a torch operator, with a fake implementation and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..operator import by_argument, computation, eager, flattened, names_needed, register_autograd
from ..routing import empty_gradient
from . import cpu
from .arguments import Operands


def _implementation(x: torch.Tensor) -> Any:
    if dispatch.use_triton(x):
        from . import gpu

        return gpu
    return cpu


@torch.library.custom_op("scattermoe_lora::norm_rotary_forward", mutates_args=())
@computation
def norm_rotary_forward(operands: Operands) -> torch.Tensor:
    """``rotate(x / rms(x) * weight)``.

    Returns:
        ``[B, S, H, D]``, contiguous, of the dtype that ``x`` and ``cos`` promote to.
    """
    result: torch.Tensor = _implementation(operands.x).forward(operands)
    return result


@norm_rotary_forward.register_fake
@flattened
def _(operands: Operands) -> torch.Tensor:
    return operands.x.new_empty(operands.x.shape, dtype=operands.out_dtype)


@torch.library.custom_op("scattermoe_lora::norm_rotary_backward", mutates_args=())
@computation
def norm_rotary_backward(dy: torch.Tensor, operands: Operands, needs: list[bool]) -> list[torch.Tensor]:
    """Gradients of :func:`norm_rotary_forward`, float32 inside and rounded once.

    Args:
        dy: ``[B, S, H, D]``, any strides.
        operands: As in the forward.
        needs: One flag each for ``x`` and ``weight``.

    Returns:
        Of ``x`` ``[B, S, H, D]`` (contiguous) and ``weight`` ``[D]`` those asked for, each in its argument's dtype. The
        weight's is summed in a fixed order: the same input gives the same bits.
    """
    names = names_needed(operands, needs)
    gradients = _implementation(operands.x).backward(dy, operands, names)
    return [gradients[name] for name in names]


@norm_rotary_backward.register_fake
@flattened
def _(dy: torch.Tensor, operands: Operands, needs: list[bool]) -> list[torch.Tensor]:
    return [empty_gradient(getattr(operands, name)) for name in names_needed(operands, needs)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:2]]
    return by_argument(ctx, _gradients(dy, *ctx.saved_tensors, ctx.eps, needs), needs)


_gradients = eager(norm_rotary_backward)
forward = register_autograd(norm_rotary_forward, _backward, _setup_context)
dispatch.refuse_second_derivative("rms_norm_rotary", norm_rotary_backward)
