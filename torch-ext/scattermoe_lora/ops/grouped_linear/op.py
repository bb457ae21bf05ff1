"""Per-expert linear over routed tokens as torch operators, with fake implementations and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..operator import by_argument, flattened, names_needed
from ..routing import empty_gradient, refuse_index_outside
from . import cpu
from .arguments import Operands

_TENSORS = len(Operands._fields)
# Those before the routing, which has no gradient.
_DIFFERENTIABLE = _TENSORS - 2


def _implementation(x: torch.Tensor) -> Any:
    if dispatch.use_triton(x):
        from . import gpu

        return gpu
    return cpu


@torch.library.custom_op("scattermoe_lora::grouped_linear_forward", mutates_args=())
@flattened
def grouped_linear_forward(
    operands: Operands, top_k: int, sentinels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y[s] = (W[e] + B[e] A[e]) x[row] + bias[e]`` for every token-expert pair s.

    Args:
        operands: Rows, parameters and routing.
        top_k: K.
        sentinels: Whether an index ``>= E`` is a pair without an expert here, or an error (seen on the CPU alone).

    Returns:
        ``y`` ``[S, N_out]`` by pair, zero where no expert here handles it; and ``x A^T`` ``[S, r]`` in sorted order for
        the backward.
    """
    refuse_index_outside(operands.order, operands.offsets, sentinels)
    with dispatch.undisturbed(operands.x):
        return _implementation(operands.x).forward(operands, top_k)


@grouped_linear_forward.register_fake
@flattened
def _(operands: Operands, top_k: int, sentinels: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, a, *_ = operands
    pairs = operands.order.shape[0]
    return x.new_empty((pairs, weight.shape[1])), x.new_empty((pairs, 0 if a is None else a.shape[1]))


@torch.library.custom_op("scattermoe_lora::grouped_linear_backward", mutates_args=())
@flattened
def grouped_linear_backward(
    dy: torch.Tensor, operands: Operands, low: torch.Tensor, top_k: int, needs: list[bool]
) -> list[torch.Tensor]:
    """Gradients of :func:`grouped_linear_forward`.

    Args:
        dy: ``[S, N_out]`` by pair.
        operands, top_k: As in the forward.
        low: The second result of the forward.
        needs: One flag each for ``x``, ``weight``, ``a``, ``b`` and ``bias``.

    Returns:
        The gradients that ``needs`` asks for, in that order. With ``weight`` frozen nothing of its size is allocated.
    """
    names = names_needed(operands, needs)
    with dispatch.undisturbed(operands.x):
        gradients = _implementation(operands.x).backward(dy, operands, low, top_k, names)
    return [gradients[name] for name in names]


@grouped_linear_backward.register_fake
@flattened
def _(
    dy: torch.Tensor, operands: Operands, low: torch.Tensor, top_k: int, needs: list[bool]
) -> list[torch.Tensor]:
    return [empty_gradient(getattr(operands, name)) for name in names_needed(operands, needs)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.top_k = inputs[_TENSORS]
    ctx.save_for_backward(*inputs[:_TENSORS], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return by_argument(ctx, (), ())
    needs = [bool(need) for need in ctx.needs_input_grad[:_DIFFERENTIABLE]]
    gradients = grouped_linear_backward(dy.contiguous(), *ctx.saved_tensors, ctx.top_k, needs)
    return by_argument(ctx, gradients, needs)


grouped_linear_forward.register_autograd(_backward, setup_context=_setup_context)
dispatch.refuse_second_derivative("grouped_linear", grouped_linear_backward)
