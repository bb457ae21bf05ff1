"""RMSNorm, with a residual added before or not, as a torch operator, with a fake implementation and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..operator import computation, eager, flattened, names_needed, register_autograd
from ..routing import empty_gradient
from . import cpu
from .arguments import Operands


def _implementation(x: torch.Tensor) -> Any:
    if dispatch.use_triton(x):
        from . import gpu

        return gpu
    return cpu


@torch.library.custom_op("scattermoe_lora::rms_norm_forward", mutates_args=())
@computation
def rms_norm_forward(operands: Operands, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``s / rms(s) * (weight + offset)`` of ``s = x + residual``.

    Returns:
        The result ``[*, H]``, contiguous, of :attr:`Operands.out_dtype`; and ``s``, of no elements without a residual.
    """
    result: tuple[torch.Tensor, torch.Tensor] = _implementation(operands.x).forward(operands, residual)
    return result


@rms_norm_forward.register_fake
@flattened
def _(operands: Operands, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    x = operands.x
    return x.new_empty(x.shape, dtype=operands.out_dtype), x.new_empty(x.shape if residual is not None else 0)


@torch.library.custom_op("scattermoe_lora::rms_norm_backward", mutates_args=())
@computation
def rms_norm_backward(
    dy: torch.Tensor, d_total: torch.Tensor | None, operands: Operands, needs: list[bool]
) -> list[torch.Tensor]:
    """Gradients of :func:`rms_norm_forward`, float32 inside and rounded once.

    Args:
        dy: ``[*, H]``, any strides.
        d_total: The gradient of the sum, likewise, or None.
        operands: As in the forward, with the sum for ``x``.
        needs: One flag each for ``x`` and ``weight``.

    Returns:
        Of the sum ``[*, H]`` (contiguous) and of ``weight`` ``[H]`` those asked for, each in its argument's dtype. The
        weight's is summed in a fixed order: the same input gives the same bits.
    """
    names = names_needed(operands, needs)
    gradients = _implementation(operands.x).backward(dy, d_total, operands, names)
    return [gradients[name] for name in names]


@rms_norm_backward.register_fake
@flattened
def _(
    dy: torch.Tensor, d_total: torch.Tensor | None, operands: Operands, needs: list[bool]
) -> list[torch.Tensor]:
    return [empty_gradient(getattr(operands, name)) for name in names_needed(operands, needs)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, *ctx.settings, residual = inputs
    total = output[1]
    if residual is None:
        ctx.mark_non_differentiable(total)
    ctx.save_for_backward(x if residual is None else total, weight)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: torch.Tensor | None, d_total: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    x_needs, weight_needs, *_, residual_needs = ctx.needs_input_grad
    d_weight, d_sum = None, d_total
    if dy is not None:
        needs = [x_needs or residual_needs, weight_needs]
        gradients = _gradients(dy, d_total, *ctx.saved_tensors, *ctx.settings, needs)
        if weight_needs:
            d_weight = gradients.pop()
        d_sum = gradients[0] if gradients else None
    return d_sum if x_needs else None, d_weight, None, None, None, d_sum if residual_needs else None


_gradients = eager(rms_norm_backward)
forward = register_autograd(rms_norm_forward, _backward, _setup_context)
dispatch.refuse_second_derivative("rms_norm", rms_norm_backward)
