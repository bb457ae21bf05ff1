"""Adapters with dropout, biases and magnitudes around a per-expert linear, composed of the grouped linear operator.

Plain factors need none of this: the operator takes them. Here is what it cannot do in one call: low-rank products of
other rows than the base product's, which dropout makes of them, and a factor for each output of the base product, as
in Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation* (2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .. import dispatch
from ..quantization.op import decode_experts
from ..quantization.stack import QuantizedStack, Weight
from .cpu import wide_dtype
from .op import forward

# Elements of the dense matrices that are looked at together, for a norm of each of their rows.
_ELEMENTS = 1 << 24


class Adapter(NamedTuple):
    """One adapter of a stack of weights ``[E, N_out, N_in]``.

    Attributes:
        a, b: ``[E, r, N_in]`` and ``[E, N_out, r]``, the scaling already in ``b``, which may be wider than the weights.
        bias: ``[E, N_out]``, scaled likewise, or None.
        magnitude: DoRA's, ``[E, N_out]``, or None.
        dropout: The share of the elements of its input that are dropped in this forward.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    dropout: float = 0.0


class LowRankTerm(NamedTuple):
    """A low-rank product that the base product's call cannot take along: ``b a dropout(x)``."""

    a: torch.Tensor
    b: torch.Tensor
    dropout: float


class Update(NamedTuple):
    """What adapters make of a per-expert linear: ``scale * (W x + b a x + bias) + terms + shift``.

    Attributes:
        a, b: Factors that the operator takes with the base product, or None.
        bias: ``[E, N_out]`` that it takes likewise, or None.
        scale: ``[E, N_out]``, float32 at least, or None for 1; with it there are ``terms``, and no ``a`` and ``bias``.
        terms: Low-rank products of their own.
        shift: ``[E, N_out]`` that is added to the first of the terms, or None.
    """

    a: torch.Tensor | None
    b: torch.Tensor | None
    bias: torch.Tensor | None
    scale: torch.Tensor | None = None
    terms: tuple[LowRankTerm, ...] = ()
    shift: torch.Tensor | None = None


def combine(adapters: Sequence[Adapter], weight: Weight, bias: torch.Tensor | None) -> Update:
    """The update of several adapters, each of which is applied to the result of those before it, as PEFT does.

    One with a magnitude scales what it is applied to (but for ``bias``) and its own low-rank product; any other adds to
    it. The norms are constants to autograd, as in section 4.3 of the paper.

    Args:
        adapters: In the order of their application; at least one.
        weight: ``[E, N_out, N_in]``; see :func:`row_norms`.
        bias: The base's own ``[E, N_out]``, or None.
    """
    dtype = weight.dtype
    terms: list[LowRankTerm] = []
    scale = shift = None
    for a, b, own_bias, magnitude, dropout in adapters:
        terms.append(LowRankTerm(a, b, dropout))
        shift = _sum(shift, own_bias)
        if magnitude is not None:
            factor = magnitude / row_norms(weight, a, b)
            terms = [term._replace(b=term.b * factor.unsqueeze(-1)) for term in terms]
            shift = None if shift is None else shift * factor
            scale = factor if scale is None else scale * factor
    together = [term for term in terms if term.dropout == 0]
    apart = [term._replace(b=term.b.to(dtype)) for term in terms if term.dropout != 0]
    a_all = b_all = None
    if together:
        a_all = torch.cat([term.a for term in together], 1)
        b_all = torch.cat([term.b.to(dtype) for term in together], 2)
    total = _sum(bias, shift)
    total = None if total is None else total.to(dtype).contiguous()
    if scale is None:
        return Update(a_all, b_all, total, terms=tuple(apart))
    if a_all is not None and b_all is not None:
        apart.insert(0, LowRankTerm(a_all, b_all, 0.0))
    return Update(None, None, None, scale, tuple(apart), total)


def finish(
    update: Update,
    y: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """The per-expert linear with adapters, of what the operator made of it with the update's ``a``, ``b`` and ``bias``.

    Dropout draws from torch's generator, once, where a checkpoint's recomputation draws the same again.

    Args:
        update: See :func:`combine`.
        y: ``[S, N_out]`` by pair, which is changed where nothing else needs it.
        x: ``[T, N_in]`` or ``[S, N_in]``.
        order, offsets, top_k: The routing, as the operator takes it.

    Returns:
        ``[S, N_out]`` by pair, zero where no expert handles it.
    """
    routing = order, offsets, top_k, True
    if update.scale is not None:
        arguments = y, update.scale, *routing
        if torch.is_grad_enabled():
            # Kept for the backward are y and the factors by expert, and not those by pair as well.
            y = checkpoint(_scaled, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y = _scaled(*arguments)
    shift = update.shift
    for a, b, dropout in update.terms:
        rows = F.dropout(x, dropout) if dropout else x
        low, _ = forward(rows, a.contiguous(), None, None, None, *routing)
        term, _ = forward(low, b.contiguous(), None, None, shift, *routing)
        y, shift = y.add_(term), None
    return y


def _scaled(
    y: torch.Tensor,
    scale: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    sentinels: bool,
) -> torch.Tensor:
    """``y * scale[e]`` of each pair's expert e, rounded once.

    The factors come as the bias of an operator on nothing, whose backward sums each expert's pairs in a fixed order.
    """
    nothing = scale.new_zeros((*scale.shape, 1))
    by_pair, _ = forward(
        scale.new_zeros((y.shape[0], 1)),
        nothing,
        None,
        None,
        scale.contiguous(),
        order,
        offsets,
        top_k,
        sentinels,
    )
    return (y * by_pair).to(y.dtype)


@torch.no_grad()
def row_norms(weight: Weight, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The Euclidean norms of the rows of ``W + B A`` for each expert, ``[E, N_out]``, never forming that sum.

    ``|w + b A|^2 = |w|^2 + 2 b (w A^T)^T + b (A A^T) b^T`` for a row ``w`` of W and ``b`` of B.

    Args:
        weight: ``[E, N_out, N_in]``, dense or quantized; few of its matrices are decoded at a time.
        a, b: ``[E, r, N_in]`` and ``[E, N_out, r]``, the scaling already in ``b``.

    Returns:
        float32, or float64 of float64; at least the smallest number above zero, so that one can divide by it.
    """
    experts, n_out, n_in = weight.shape
    wide = wide_dtype(a)
    few = max(1, _ELEMENTS // (n_out * n_in))
    norms = []
    with dispatch.undisturbed(a):
        for start in range(0, experts, few):
            chunk = slice(start, start + few)
            low, high = a[chunk], b[chunk].to(wide)
            if isinstance(weight, QuantizedStack):
                numbers = list(range(start, min(start + few, experts)))
                matrices = decode_experts(*weight.operands(), weight.dtype, numbers)
            else:
                matrices = weight[chunk]
            squares = torch.linalg.vector_norm(matrices, dim=-1, dtype=wide).square()
            cross = torch.bmm(matrices, low.to(matrices.dtype).mT).to(wide)
            gram = torch.bmm(low.to(wide), low.to(wide).mT)
            squares += (high * (2 * cross + torch.bmm(high, gram))).sum(-1)
            norms.append(squares.clamp_(min=torch.finfo(wide).tiny).sqrt_())
    return torch.cat(norms)


def _sum(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor | None:
    return right if left is None else left if right is None else left + right
