"""Native CPU implementation: one expert at a time on a contiguous block of rows.

Buffers of one expert's rows are allocated once a call and used again for every expert: they stay in cache, and the
system is not asked for fresh pages, which costs more than the arithmetic on small experts.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

import torch

from ..cpu_matmul import add_matmul, low_rank_matmul, matmul, rounded
from ..routing import empty_gradient
from .arguments import Operands

Part = tuple[int, int, int]
"""An expert, and its rows in sorted order: ``(expert, start, end)``."""


def expert_ranges(offsets: torch.Tensor) -> list[Part]:
    """``(expert, start, end)`` of every expert that has rows, from ``offsets`` ``[E + 1]``."""
    bounds = offsets.tolist()
    return [(e, start, end) for e, (start, end) in enumerate(pairwise(bounds)) if start < end]


def end_of(parts: list[Part]) -> int:
    """The number of pairs that have an expert."""
    return parts[-1][2] if parts else 0


def most_rows(parts: list[Part]) -> int:
    """Rows of a buffer for the fullest expert, with as many more as a product may read."""
    return rounded(max((end - start for _, start, end in parts), default=0))


def accumulator(shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Zeros in which rows are summed: float32 at least, because a token's sum over its experts must not be rounded
    once an expert."""
    dtype = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
    return like.new_zeros(shape, dtype=dtype)


def per_expert(like: torch.Tensor, parts: list[Part]) -> torch.Tensor:
    """An uninitialised ``[E, ...]`` like ``like`` in which the experts without rows are already zero."""
    out = empty_gradient(like)
    busy = {e for e, _, _ in parts}
    for e in range(like.shape[0]):
        if e not in busy:
            out[e].zero_()
    return out


def transposed(matrix: torch.Tensor | None) -> torch.Tensor | None:
    """A view of a stack of matrices, each of them transposed; None for None."""
    return None if matrix is None else matrix.mT


class Projection:
    """A linear map for each expert, applied to the rows of one expert at a time.

    Views are made for all experts at once: one by one they would cost as much as the smaller products.

    Args:
        weight: ``[E, N_out, N_in]``.
        a, b: ``[E, r, N_in]`` and ``[E, N_out, r]``, or None.
        bias: ``[E, N_out]`` or None.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> None:
        self._weight = weight.mT.unbind()
        self._factors = None if a is None or b is None else (a.mT.unbind(), b.mT.unbind())
        self._bias = None if bias is None else bias.unbind()

    def low(self, expert: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        """``x A^T`` into ``out``; None without factors."""
        return None if self._factors is None else matmul(x, self._factors[0][expert], out)

    def apply(
        self, expert: int, x: torch.Tensor, low: torch.Tensor | None, out: torch.Tensor
    ) -> torch.Tensor:
        """``x W^T (+ low B^T) (+ bias)`` into ``out``; ``low`` is what :meth:`low` returned."""
        weight = self._weight[expert]
        bias = None if self._bias is None else self._bias[expert]
        if low is None or self._factors is None:
            return matmul(x, weight, out) if bias is None else add_matmul(x, weight, out.copy_(bias))
        b = self._factors[1][expert]
        if bias is None:
            return low_rank_matmul(x, weight, low, b, out)
        return add_matmul(x, weight, add_matmul(low, b, out.copy_(bias)))


def outer(p: torch.Tensor, q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``p^T q`` into ``out``, which may be a transposed view."""
    if out.is_contiguous():
        return torch.mm(p.t(), q, out=out)
    return torch.mm(q.t(), p, out=out.t()).t()


def sum_rows(rows: torch.Tensor, out: torch.Tensor) -> None:
    """The column sums of ``rows`` into ``out``, rounded once."""
    wide = torch.float32 if rows.dtype in (torch.bfloat16, torch.float16) else rows.dtype
    out.copy_(rows.sum(dim=0, dtype=wide))


def forward(operands: Operands, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.grouped_linear.op.grouped_linear_forward`."""
    x, weight, a, b, bias, order, offsets = operands
    parts = expert_ranges(offsets)
    pairs = order.shape[0]
    y = x.new_empty((pairs, weight.shape[1]))
    if end_of(parts) < pairs:
        y.zero_()
    low = x.new_zeros((pairs, 0 if a is None else a.shape[1]))
    rows_of = operands.rows(top_k)
    most = most_rows(parts)
    x_buffer = x.new_empty((most, x.shape[1]))
    y_buffer = y.new_empty((most, y.shape[1]))
    projection = Projection(weight, a, b, bias)
    for e, start, end in parts:
        x_e = torch.index_select(x, 0, rows_of[start:end], out=x_buffer[: end - start])
        low_e = projection.low(e, x_e, low[start:end])
        y.index_copy_(0, order[start:end], projection.apply(e, x_e, low_e, y_buffer[: end - start]))
    return y, low


def backward(
    dy: torch.Tensor, operands: Operands, low: torch.Tensor, top_k: int, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.grouped_linear.op.grouped_linear_backward`."""
    x, weight, a, b, _, order, offsets = operands
    parts = expert_ranges(offsets)
    rows_of = operands.rows(top_k)
    most = most_rows(parts)
    gradients = {name: per_expert(getattr(operands, name), parts) for name in names if name != "x"}
    d_weight, da, db, d_bias = (gradients.get(name) for name in ("weight", "a", "b", "bias"))
    dx = accumulator(x.shape, x) if "x" in names else None
    dy_buffer = dy.new_empty((most, dy.shape[1]))
    x_buffer = x.new_empty((most, x.shape[1]))
    du_buffer = dy.new_empty((most, 0 if b is None else b.shape[2]))
    reverse = Projection(weight.mT, transposed(b), transposed(a))
    for e, start, end in parts:
        rows = rows_of[start:end]
        x_e = x_buffer[: end - start]
        dy_e = torch.index_select(dy, 0, order[start:end], out=dy_buffer[: end - start])
        du = reverse.low(e, dy_e, du_buffer[: end - start])
        if d_weight is not None or da is not None:
            torch.index_select(x, 0, rows, out=x_e)
        if d_weight is not None:
            outer(dy_e, x_e, d_weight[e])
        if da is not None and du is not None:
            torch.mm(du.t(), x_e, out=da[e])
        if db is not None:
            torch.mm(dy_e.t(), low[start:end], out=db[e])
        if d_bias is not None:
            sum_rows(dy_e, d_bias[e])
        if dx is not None:
            # The gradient takes the place of the rows, which have served.
            dx.index_add_(0, rows, reverse.apply(e, dy_e, du, x_e).to(dx.dtype))
    if dx is not None:
        gradients["x"] = dx.to(x.dtype)
    return gradients
