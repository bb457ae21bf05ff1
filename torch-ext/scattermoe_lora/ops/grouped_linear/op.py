"""Per-expert linear over routed tokens as torch operators, with fake implementations and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..routing import empty_gradient, refuse_index_outside
from . import cpu


@torch.library.custom_op("scattermoe_lora::grouped_linear_forward", mutates_args=())
def grouped_linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    sentinels: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y[s] = (W[e] + B[e] A[e]) x[row] + bias[e]`` for every token-expert pair s.

    Args:
        x: ``[T, N_in]`` (a token's row serves its K pairs) or ``[S, N_in]``.
        weight: ``[E, N_out, N_in]``, contiguous or a transposed view of a contiguous ``[E, N_in, N_out]``.
        a, b: ``[E, r, N_in]`` and ``[E, N_out, r]``, the scaling already in ``b``, or None.
        bias: ``[E, N_out]`` or None.
        order, offsets: ``[S]`` and ``[E + 1]``, the fields of a :class:`scattermoe_lora.ops.routing.Routing`.
        top_k: K.
        sentinels: Whether an index ``>= E`` is a pair without an expert here, or an error (seen on the CPU alone).

    Returns:
        ``y`` ``[S, N_out]`` by pair, zero where no expert here handles it; and ``x A^T`` ``[S, r]`` in sorted order for
        the backward.
    """
    refuse_index_outside(order, offsets, sentinels)
    arguments = (x, weight, order, offsets, a, b, bias, top_k)
    with dispatch.undisturbed(x):
        if dispatch.use_triton(x):
            from . import gpu

            return gpu.forward(*arguments)
        return cpu.forward(*arguments)


@grouped_linear_forward.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    sentinels: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = order.shape[0]
    return x.new_empty((pairs, weight.shape[1])), x.new_empty((pairs, 0 if a is None else a.shape[1]))


@torch.library.custom_op("scattermoe_lora::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    offsets: torch.Tensor,
    low: torch.Tensor,
    top_k: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of :func:`grouped_linear_forward`.

    Args:
        dy: ``[S, N_out]`` by pair.
        low: The second result of the forward.
        needs: One flag each for ``x``, ``weight``, ``a``, ``b`` and ``bias``.

    Returns:
        The gradients that ``needs`` asks for, in that order. With ``weight`` frozen nothing of its size is allocated.
    """
    arguments = (dy, x, weight, order, offsets, a, b, bias, low, top_k, needs)
    with dispatch.undisturbed(x):
        if dispatch.use_triton(x):
            from . import gpu

            gradients = gpu.backward(*arguments)
        else:
            gradients = cpu.backward(*arguments)
    return [g for g in gradients if g is not None]


@grouped_linear_backward.register_fake
def _(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    offsets: torch.Tensor,
    low: torch.Tensor,
    top_k: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    return [
        empty_gradient(t)
        for t, need in zip((x, weight, a, b, bias), needs, strict=True)
        if need and t is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.top_k, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    needs = [bool(need) for need in ctx.needs_input_grad[:5]]
    gradients = iter(grouped_linear_backward(dy.contiguous(), *ctx.saved_tensors, ctx.top_k, needs))
    return (*(next(gradients) if need else None for need in needs), None, None, None, None)


grouped_linear_forward.register_autograd(_backward, setup_context=_setup_context)
