"""RMSNorm with rotary embedding as a torch operator, with a fake implementation and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from . import cpu


def _out_dtype(x: torch.Tensor, cos: torch.Tensor | None) -> torch.dtype:
    return x.dtype if cos is None else torch.promote_types(x.dtype, cos.dtype)


@torch.library.custom_op("scattermoe_lora::norm_rotary_forward", mutates_args=())
def norm_rotary_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """``rotate(x / rms(x) * weight)``.

    Args:
        x: ``[B, S, H, D]``, any strides.
        weight: ``[D]`` or None.
        cos, sin: ``[B or 1, S, rot]``, dtype of ``x`` or float32; None leaves the rotation out.
        eps: Added to the mean of squares.

    Returns:
        ``[B, S, H, D]``, contiguous, of the dtype that ``x`` and ``cos`` promote to.
    """
    arguments = (x, weight, cos, sin, eps, _out_dtype(x, cos))
    with dispatch.undisturbed(x):
        if dispatch.use_triton(x):
            from . import gpu

            return gpu.forward(*arguments)
        return cpu.forward(*arguments)


@norm_rotary_forward.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=_out_dtype(x, cos))


@torch.library.custom_op("scattermoe_lora::norm_rotary_backward", mutates_args=())
def norm_rotary_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
    need_x: bool,
    need_weight: bool,
) -> list[torch.Tensor]:
    """Gradients of :func:`norm_rotary_forward`, float32 inside and rounded once.

    Args:
        dy: ``[B, S, H, D]``, any strides.
        need_x, need_weight: Which gradients to compute.

    Returns:
        Of ``x`` ``[B, S, H, D]`` (contiguous) and ``weight`` ``[D]`` those asked for, each in its argument's dtype. The
        weight's is summed in a fixed order: the same input gives the same bits.
    """
    arguments = (dy, x, weight, cos, sin, eps, need_x, need_weight)
    with dispatch.undisturbed(x):
        if dispatch.use_triton(x):
            from . import gpu

            gradients = gpu.backward(*arguments)
        else:
            gradients = cpu.backward(*arguments)
    return [gradient for gradient in gradients if gradient is not None]


@norm_rotary_backward.register_fake
def _(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
    need_x: bool,
    need_weight: bool,
) -> list[torch.Tensor]:
    gradients = [x.new_empty(x.shape)] if need_x else []
    if need_weight and weight is not None:
        gradients.append(weight.new_empty(weight.shape))
    return gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    need_x, need_weight = (bool(need) for need in ctx.needs_input_grad[:2])
    gradients = iter(norm_rotary_backward(dy, *ctx.saved_tensors, ctx.eps, need_x, need_weight))
    return next(gradients) if need_x else None, next(gradients) if need_weight else None, None, None, None


norm_rotary_forward.register_autograd(_backward, setup_context=_setup_context)
