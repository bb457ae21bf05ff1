"""Native CPU implementation: one expert at a time on a contiguous block of rows.

Buffers of one expert's rows are allocated once a call and used again for every expert: they stay in cache, and the
system is not asked for fresh pages, which costs more than the arithmetic on small experts.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from ..cpu_matmul import add_product, product, rounded, two_products
from ..routing import empty_gradient


def segments(offsets: torch.Tensor) -> list[tuple[int, int, int]]:
    """``(expert, start, end)`` of every expert that has rows, from ``offsets`` ``[E + 1]``."""
    bounds = offsets.tolist()
    return [(e, start, end) for e, (start, end) in enumerate(pairwise(bounds)) if start < end]


def most_rows(parts: list[tuple[int, int, int]]) -> int:
    """Rows of a buffer for the fullest expert, with as many more as a product may read."""
    return rounded(max((end - start for _, start, end in parts), default=0))


def accumulator(shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Zeros in which rows are summed: float32 at least, because a token's sum over its experts must not be rounded
    once an expert."""
    dtype = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
    return like.new_zeros(shape, dtype=dtype)


def per_expert(like: torch.Tensor, parts: list[tuple[int, int, int]]) -> torch.Tensor:
    """An uninitialised ``[E, ...]`` like ``like`` in which the experts without rows are already zero."""
    out = empty_gradient(like)
    busy = {e for e, _, _ in parts}
    for e in range(like.shape[0]):
        if e not in busy:
            out[e].zero_()
    return out


def linear(
    x: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    low_right: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ right (+ low @ low_right) (+ bias)`` of one expert into ``out``."""
    if low is None or low_right is None:
        return product(x, right, out) if bias is None else add_product(x, right, out.copy_(bias))
    if bias is None:
        return two_products(x, right, low, low_right, out)
    return add_product(x, right, add_product(low, low_right, out.copy_(bias)))


def outer(p: torch.Tensor, q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``p^T q`` into ``out``, which may be a transposed view."""
    if out.is_contiguous():
        return torch.mm(p.t(), q, out=out)
    return torch.mm(q.t(), p, out=out.t()).t()


def sum_rows(rows: torch.Tensor, out: torch.Tensor) -> None:
    """The column sums of ``rows`` into ``out``, rounded once."""
    wide = torch.float32 if rows.dtype in (torch.bfloat16, torch.float16) else rows.dtype
    out.copy_(rows.sum(dim=0, dtype=wide))


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.grouped_linear.op.grouped_linear_forward`."""
    parts = segments(offsets)
    pairs = order.shape[0]
    y = (
        x.new_zeros((pairs, weight.shape[1]))
        if offsets[-1] < pairs
        else x.new_empty((pairs, weight.shape[1]))
    )
    low = x.new_zeros((pairs, 0 if a is None else a.shape[1]))
    rows_of = order if x.shape[0] == pairs else order // top_k
    most = most_rows(parts)
    x_buffer = x.new_empty((most, x.shape[1]))
    y_buffer = y.new_empty((most, y.shape[1]))
    for e, start, end in parts:
        x_e, y_e = x_buffer[: end - start], y_buffer[: end - start]
        torch.index_select(x, 0, rows_of[start:end], out=x_e)
        bias_e = None if bias is None else bias[e]
        if a is not None and b is not None:
            u_e = product(x_e, a[e].t(), low[start:end])
            linear(x_e, weight[e].t(), y_e, bias_e, u_e, b[e].t())
        else:
            linear(x_e, weight[e].t(), y_e, bias_e)
        y.index_copy_(0, order[start:end], y_e)
    return y, low


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    low: torch.Tensor,
    top_k: int,
    needs: list[bool],
) -> list[torch.Tensor | None]:
    """See :func:`scattermoe_lora.ops.grouped_linear.op.grouped_linear_backward`."""
    need_x, need_weight, need_a, need_b, need_bias = needs
    parts = segments(offsets)
    rows_of = order if x.shape[0] == order.shape[0] else order // top_k
    most = most_rows(parts)
    dx = accumulator(x.shape, x) if need_x else None
    d_weight = per_expert(weight, parts) if need_weight else None
    da = per_expert(a, parts) if need_a and a is not None else None
    db = per_expert(b, parts) if need_b and b is not None else None
    d_bias = per_expert(bias, parts) if need_bias and bias is not None else None
    dy_buffer = dy.new_empty((most, dy.shape[1]))
    x_buffer = x.new_empty((most, x.shape[1]))
    du_buffer = dy.new_empty((most, 0 if b is None else b.shape[2]))
    for e, start, end in parts:
        rows = rows_of[start:end]
        dy_e, x_e = dy_buffer[: end - start], x_buffer[: end - start]
        torch.index_select(dy, 0, order[start:end], out=dy_e)
        du = None if a is None or b is None else product(dy_e, b[e], du_buffer[: end - start])
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
            dx_e = linear(dy_e, weight[e], x_e, low=du, low_right=None if a is None else a[e])
            dx.index_add_(0, rows, dx_e.to(dx.dtype))
    return [None if dx is None else dx.to(x.dtype), d_weight, da, db, d_bias]
