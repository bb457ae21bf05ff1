"""Projections with low-rank adapters as torch operators, with fake implementations and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..operator import computation, eager, flattened, register_autograd
from ..routing import empty_gradient
from . import products
from .arguments import Operands

# The fields that have gradients, in the order of the operator's arguments.
_DIFFERENTIABLE = ("x", "weights", "a", "b", "biases")


def _names(operands: Operands, needs: list[bool]) -> list[tuple[str, int]]:
    """The gradients flagged in ``needs``, each as a field and a position in its list."""
    names = [
        (field, i)
        for field in _DIFFERENTIABLE
        for i in range(1 if field == "x" else len(getattr(operands, field)))
    ]
    return [name for name, need in zip(names, needs, strict=True) if need]


@torch.library.custom_op("scattermoe_lora::lora_linear_forward", mutates_args=())
@computation
def lora_linear_forward(operands: Operands) -> tuple[list[torch.Tensor], torch.Tensor]:
    """``y_p = x W_p^T + b_p + sum_i s_i dropout_i(x) A_i^T B_i^T`` for each projection ``p``.

    Returns:
        The ``y_p`` ``[T, N_p]``, contiguous, in the dtype of ``x``; and the low-rank products of all pairs ``[T, R]``
        for the backward.
    """
    return products.forward(operands)


@lora_linear_forward.register_fake
@flattened
def _(operands: Operands) -> tuple[list[torch.Tensor], torch.Tensor]:
    x = operands.x
    tokens = x.shape[0]
    return [x.new_empty((tokens, w.shape[0])) for w in operands.weights], x.new_empty(
        (tokens, sum(operands.ranks))
    )


@torch.library.custom_op("scattermoe_lora::lora_linear_backward", mutates_args=())
@computation
def lora_linear_backward(
    dys: list[torch.Tensor],
    dy_projections: list[int],
    operands: Operands,
    low: torch.Tensor,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of :func:`lora_linear_forward`.

    Args:
        dys, dy_projections: ``[T, N_p]`` each, and the projections that they are of.
        operands: As in the forward.
        low: The second result of the forward.
        needs: One flag each for ``x`` and every tensor of ``weights``, ``a``, ``b`` and ``biases``.

    Returns:
        The gradients that ``needs`` asks for, in that order, each in its argument's dtype. Nothing of the size of a
        frozen weight is allocated.
    """
    names = _names(operands, needs)
    gradients = products.backward(
        dict(zip(dy_projections, dys, strict=True)), operands, low, frozenset(names)
    )
    return [gradients[name] for name in names]


@lora_linear_backward.register_fake
@flattened
def _(
    dys: list[torch.Tensor],
    dy_projections: list[int],
    operands: Operands,
    low: torch.Tensor,
    needs: list[bool],
) -> list[torch.Tensor]:
    of = {field: getattr(operands, field) for field in _DIFFERENTIABLE} | {"x": [operands.x]}
    return [empty_gradient(of[field][i]) for field, i in _names(operands, needs)]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[list[torch.Tensor], torch.Tensor]
) -> None:
    operands = Operands(*inputs)
    ctx.lengths = [len(getattr(operands, field)) for field in _DIFFERENTIABLE[1:]]
    ctx.numbers = inputs[len(_DIFFERENTIABLE) + 1 :]
    lists = (tensor for field in _DIFFERENTIABLE[1:] for tensor in getattr(operands, field))
    ctx.save_for_backward(operands.x, operands.seed, output[1], *lists)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dys: list[torch.Tensor | None], _: Any) -> tuple[Any, ...]:
    x, seed, low, *tensors = ctx.saved_tensors
    rest = iter(tensors)
    weights, a, b, biases = ([next(rest) for _ in range(length)] for length in ctx.lengths)
    operands = Operands(x, weights, a, b, biases, seed, *ctx.numbers)
    present = {p: dy.contiguous() for p, dy in enumerate(dys) if dy is not None}
    # Which projection a tensor's gradient needs that of.
    owners = [range(len(weights)), operands.projections, operands.projections, operands.bias_projections]
    needs = [
        [need and owner in present for need, owner in zip(flags, owner_of, strict=True)]
        for flags, owner_of in zip(ctx.needs_input_grad[1 : len(_DIFFERENTIABLE)], owners, strict=True)
    ]
    flags = [bool(ctx.needs_input_grad[0] and present), *(flag for group in needs for flag in group)]
    gradients = iter(
        _gradients(list(present.values()), list(present), *operands[:6], *ctx.numbers, low, flags)
        if any(flags)
        else ()
    )
    dx = next(gradients) if flags[0] else None
    lists = [[next(gradients) if flag else None for flag in group] for group in needs]
    # An empty list of numbers looks like one of tensors to autograd.
    return (dx, *lists, None, *([] if not numbers else None for numbers in ctx.numbers))


_gradients = eager(lora_linear_backward)
forward = register_autograd(lora_linear_forward, _backward, _setup_context)
dispatch.refuse_second_derivative("lora_linear", lora_linear_backward)
