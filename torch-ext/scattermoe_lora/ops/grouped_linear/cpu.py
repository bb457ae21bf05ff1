"""Native CPU implementation: a few experts at a time, their rows gathered while they are in cache.

The low-rank product is written first and the base product is added to it: the sum is then rounded once, after the
large term, and not twice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ..cpu_blocks import Block, split
from ..cpu_matmul import add_matmul, rounded
from ..quantization.cpu import Matrices
from ..quantization.stack import QuantizedStack, Weight
from ..routing import empty_gradient
from .arguments import Operands

# Widest gradient that is computed for all experts of a block at once: that of a low-rank factor.
_LOW_RANK = 256


def accumulator(shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Zeros in which rows are summed: float32 at least, because a token's sum over its experts must not be rounded
    once an expert."""
    return like.new_zeros(shape, dtype=wide_dtype(like))


def wide_dtype(rows: torch.Tensor) -> torch.dtype:
    """The dtype in which ``rows`` are summed: float32 at least."""
    return torch.float32 if rows.dtype in (torch.bfloat16, torch.float16) else rows.dtype


def per_expert(like: torch.Tensor, blocks: list[Block]) -> torch.Tensor:
    """An uninitialised ``[E, ...]`` like ``like`` in which the experts outside the blocks are already zero."""
    unused = set(range(like.shape[0])).difference(*(block.experts for block in blocks))
    return empty_gradient(like).index_fill_(0, torch.tensor(sorted(unused), dtype=torch.int64), 0)


def transposed(matrix: torch.Tensor | None) -> torch.Tensor | None:
    """A view of a stack of matrices, each of them transposed; None for None."""
    return None if matrix is None else matrix.mT


class Projection:
    """A linear map for each expert, applied to the rows of a block.

    Args:
        weight: ``[E, N_out, N_in]``; a quantized one decodes to the dtype that it stands for.
        a, b: ``[E, r, N_in]`` and ``[E, N_out, r]``, or None.
        bias: ``[E, N_out]`` or None.
    """

    def __init__(
        self,
        weight: Weight,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> None:
        # Views of all experts at once: one by one they would cost as much as the smaller products. A quantized matrix
        # is decoded when it is taken.
        self._weights: Sequence[torch.Tensor] = (
            Matrices(weight.mT) if isinstance(weight, QuantizedStack) else weight.mT.unbind()
        )
        self._factors = None if a is None or b is None else (a.mT, b.mT)
        self._bias = bias

    def low(self, block: Block, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``x A^T`` of a block's rows, in the first rows of ``out``, which has no columns without factors."""
        out = out[: block.size]
        if self._factors is not None:
            a = block.of(self._factors[0])
            torch.bmm(block.by_expert(x), a, out=block.by_expert(out))
        return out

    def apply(self, block: Block, x: torch.Tensor, low: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``x W^T (+ low B^T) (+ bias)`` of a block's rows into the first rows of ``out``."""
        out = out[: block.size]
        sums, low = block.by_expert(out), block.by_expert(low)
        bias = None if self._bias is None else block.of(self._bias).unsqueeze(1)
        if self._factors is None:
            sums.zero_() if bias is None else sums.copy_(bias)
        else:
            b = block.of(self._factors[1])
            torch.bmm(low, b, out=sums) if bias is None else torch.baddbmm(bias, low, b, out=sums)
        rows = block.by_expert(x).unbind()
        for expert, x_e, count, sum_e in zip(block.experts, rows, block.counts, sums.unbind(), strict=True):
            n = rounded(count)
            add_matmul(x_e[:n], self._weights[expert], sum_e[:n])
        return out


def outer(block: Block, p: torch.Tensor, q: torch.Tensor, out: torch.Tensor) -> None:
    """``p^T q`` of each expert's rows into its part of ``out`` ``[E, *, *]``, which may be a transposed view."""
    if not out.is_contiguous():
        p, q, out = q, p, out.mT
    p, q = block.by_expert(p), block.by_expert(q)
    if min(out.shape[1:]) <= _LOW_RANK:
        # The few columns first: the other way round takes twice the time, more than the transpose of the result.
        narrow = torch.bmm(p.mT, q) if out.shape[1] <= out.shape[2] else torch.bmm(q.mT, p).mT
        out.index_copy_(0, block.index, narrow)
    else:
        # One by one, into its place: together they would be as large as the experts' weights.
        for expert, p_e, q_e in zip(block.experts, p.unbind(), q.unbind(), strict=True):
            torch.mm(p_e.mT, q_e, out=out[expert])


def sum_rows(block: Block, rows: torch.Tensor, out: torch.Tensor) -> None:
    """The column sums of each expert's rows into its part of ``out`` ``[E, *]``, rounded once."""
    sums = block.by_expert(rows).sum(dim=1, dtype=wide_dtype(rows))
    out.index_copy_(0, block.index, sums.to(out.dtype))


def forward(operands: Operands, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.grouped_linear.op.grouped_linear_forward`."""
    x, weight, a, b, bias, order, offsets = operands
    order, blocks = split(order, offsets, max(weight.shape[1:]) * x.element_size())
    pairs = order.shape[0]
    y = x.new_zeros((pairs, weight.shape[1]))
    low = x.new_zeros((pairs, 0 if a is None else a.shape[1]))
    rows_of = operands._replace(order=order).rows(top_k)
    most = max((block.size for block in blocks), default=0)
    x_buffer, y_buffer, low_buffer = (x.new_empty((most, n)) for n in (x.shape[1], y.shape[1], low.shape[1]))
    projection = Projection(weight, a, b, bias)
    for block in blocks:
        rows = block.gather(x, rows_of, x_buffer)
        block_low = projection.low(block, rows, low_buffer)
        result = projection.apply(block, rows, block_low, y_buffer)
        block.own(block_low, out=low[block.positions])
        y.index_copy_(0, order[block.positions], block.own(result))
    return y, low


def backward(
    dy: torch.Tensor, operands: Operands, low: torch.Tensor, top_k: int, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.grouped_linear.op.grouped_linear_backward`."""
    x, weight, a, b, _, order, offsets = operands
    order, blocks = split(order, offsets, max(weight.shape[1:]) * x.element_size())
    rows_of = operands._replace(order=order).rows(top_k)
    sorted_rows = torch.arange(order.shape[0])
    gradients = {name: per_expert(getattr(operands, name), blocks) for name in names if name != "x"}
    d_weight, da, db, d_bias = (gradients.get(name) for name in ("weight", "a", "b", "bias"))
    dx = accumulator(x.shape, x) if "x" in names else None
    most = max((block.size for block in blocks), default=0)
    dy_buffer, x_buffer, low_buffer, du_buffer = (
        x.new_empty((most, n)) for n in (dy.shape[1], x.shape[1], low.shape[1], low.shape[1])
    )
    reverse = Projection(weight.mT, transposed(b), transposed(a))
    for block in blocks:
        block_dy = block.gather(dy, order, dy_buffer)
        du = reverse.low(block, block_dy, du_buffer)
        if d_weight is not None or da is not None:
            rows = block.gather(x, rows_of, x_buffer)
            if d_weight is not None:
                outer(block, block_dy, rows, d_weight)
            if da is not None:
                outer(block, du, rows, da)
        if db is not None:
            outer(block, block_dy, block.gather(low, sorted_rows, low_buffer), db)
        if d_bias is not None:
            sum_rows(block, block_dy, d_bias)
        if dx is not None:
            # The gradient takes the place of the rows, which have served.
            rows = reverse.apply(block, block_dy, du, x_buffer)
            dx.index_add_(0, rows_of[block.positions], block.own(rows).to(dx.dtype))
    if dx is not None:
        gradients["x"] = dx.to(x.dtype)
    return gradients
