"""Triton implementation: launches of the grouped GEMMs, composed to forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .. import tile_tables as tiles
from .kernels import grouped_matmul_kernel, grouped_outer_kernel


def float32_precision(x: torch.Tensor) -> str:
    """Full float32 unless the user allowed TF32, by the switch that torch's own matmul follows and that all others set.
    AMD's matrix cores multiply float32 as it is."""
    is_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if is_tf32 and x.dtype == torch.float32 and not torch.version.hip else "ieee"


class Product(NamedTuple):
    """A launch of one of the kernels that multiply rows: what they all take."""

    grid: tuple[int]
    operands: tuple[torch.Tensor | int, ...]
    constants: dict[str, Any]


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    *,
    top_k: int | None,
    low: torch.Tensor | None,
    low_weight: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> Product:
    """The launch of ``x[row] W[e]^T (+ low[s] C[e]^T) (+ bias[e])``; arguments as for :func:`grouped_matmul`."""
    num_experts, n_out, n_in = weight.shape
    pairs = order.shape[0]
    rank = 0 if low is None else low.shape[1]
    launch = tiles.launch("grouped_matmul", x, pairs / num_experts, n_out, n_in)
    # At most this many: one is begun for every segment that has rows, and the others are full.
    tiles_m = pairs // launch["BLOCK_M"] + min(pairs, num_experts + 1)
    operands: tuple[torch.Tensor | int, ...] = (
        x,
        weight,
        x if low is None else low,
        weight if low_weight is None else low_weight,
        weight if bias is None else bias,
        order,
        offsets,
        pairs,
        num_experts,
        n_out,
        n_in,
        rank,
        x.stride(0),
        *weight.stride(),
        *((0, 0, 0) if low_weight is None else low_weight.stride()),
    )
    constants = {
        "GATHER": top_k is not None,
        "TOP_K": top_k or 1,
        "LOW_RANK": low is not None,
        "BIAS": bias is not None,
        "EXPERTS_POW2": triton.next_power_of_2(num_experts + 1),
        "PRECISION": float32_precision(x),
        "EVEN_K": n_in % launch["BLOCK_K"] == 0,
        # A short sum needs no long block; 16 is the least that ``tl.dot`` multiplies.
        "BLOCK_R": min(launch["BLOCK_K"], max(16, triton.next_power_of_2(rank))),
        **launch,
    }
    return Product((tiles_m * triton.cdiv(n_out, launch["BLOCK_N"]),), operands, constants)


def grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    *,
    top_k: int | None = None,
    low: torch.Tensor | None = None,
    low_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    scatter: bool = False,
) -> torch.Tensor:
    """``x[row] W[e]^T (+ low[s] C[e]^T) (+ bias[e])`` for every pair.

    Args:
        x: Rows: ``[S, N_in]`` in sorted order if ``top_k`` is None, else the row of pair p is ``p // top_k``
            (``top_k=1``: by pair).
        weight: ``[E, N_out, N_in]``, any strides (a transposed view serves the backward).
        low, low_weight: ``[S, r]`` in sorted order and ``[E, N_out, r]``, any strides; or None.
        bias: ``[E, N_out]``, contiguous; or None.
        row_weight: ``[S]`` by pair, multiplies the result; or None.
        scatter: Write by pair instead of in sorted order.

    Returns:
        ``[S, N_out]``; zero for pairs without an expert here.
    """
    pairs = order.shape[0]
    out = x.new_empty((pairs, weight.shape[1]))
    if pairs == 0:
        return out
    grid, operands, constants = product(
        x, weight, order, offsets, top_k=top_k, low=low, low_weight=low_weight, bias=bias
    )
    grouped_matmul_kernel[grid](
        *operands,
        x if row_weight is None else row_weight,
        out,
        SCATTER=scatter,
        WEIGHTED=row_weight is not None,
        **constants,
    )
    return out


def grouped_outer(
    p: torch.Tensor,
    q: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    *,
    top_k_p: int | None = None,
    top_k_q: int | None = None,
    row_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sum over the pairs of expert e of p[row]^T q[row]``, the gradient of a per-expert matrix.

    Args:
        p, q: ``[*, N_p]`` and ``[*, N_q]``; rows as in :func:`grouped_matmul`, of one dtype.
        top_k_p, top_k_q: None where the rows are in sorted order. If both are given they are equal.
        row_weight: ``[S]`` by pair, multiplies each term; or None.

    Returns:
        ``[E, N_p, N_q]``; zero for experts without pairs.
    """
    num_experts = offsets.shape[0] - 1
    n_p, n_q = p.shape[1], q.shape[1]
    out = p.new_empty((num_experts, n_p, n_q))
    launch = tiles.launch("grouped_outer", p, order.shape[0] / num_experts, n_q, n_p)
    grid = (triton.cdiv(n_q, launch["BLOCK_Q"]), triton.cdiv(n_p, launch["BLOCK_P"]), num_experts)
    grouped_outer_kernel[grid](
        p,
        q,
        p if row_weight is None else row_weight,
        out,
        order,
        offsets,
        n_p,
        n_q,
        p.stride(0),
        q.stride(0),
        GATHER_P=top_k_p is not None,
        GATHER_Q=top_k_q is not None,
        TOP_K=top_k_p or top_k_q or 1,
        WEIGHTED=row_weight is not None,
        PRECISION=float32_precision(p),
        **launch,
    )
    return out


def weight_gradient(
    weight: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    *,
    top_k_p: int | None = None,
    top_k_q: int | None = None,
    row_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`grouped_outer` in the layout of ``weight``: where that is a transposed view, so is the result."""
    if not weight.is_contiguous() and weight.mT.is_contiguous():
        out = grouped_outer(q, p, order, offsets, top_k_p=top_k_q, top_k_q=top_k_p, row_weight=row_weight)
        return out.mT
    return grouped_outer(p, q, order, offsets, top_k_p=top_k_p, top_k_q=top_k_q, row_weight=row_weight)


def bias_gradient(
    dy: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    *,
    top_k: int | None = None,
    row_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of each expert's rows of ``dy``, ``[E, N_out]``; rows as in :func:`grouped_matmul`."""
    ones = dy.new_ones((order.shape[0], 1))
    return grouped_outer(dy, ones, order, offsets, top_k_p=top_k, row_weight=row_weight).squeeze(2)


def sum_choices(by_pair: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[S, N]`` by pair to ``[T, N]``: each token's rows summed in float32, in a fixed order."""
    pairs, columns = by_pair.shape
    return by_pair.view(tokens, pairs // max(tokens, 1), columns).sum(dim=1)


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
    rows = 1 if x.shape[0] == order.shape[0] else top_k
    low = x.new_empty((order.shape[0], 0)) if a is None else grouped_matmul(x, a, order, offsets, top_k=rows)
    y = grouped_matmul(
        x,
        weight,
        order,
        offsets,
        top_k=rows,
        low=None if a is None else low,
        low_weight=b,
        bias=bias,
        scatter=True,
    )
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
    rows = 1 if x.shape[0] == order.shape[0] else top_k
    du = None if a is None or b is None else grouped_matmul(dy, b.mT, order, offsets, top_k=1)
    dx = d_weight = da = db = d_bias = None
    if need_x:
        dx = grouped_matmul(
            dy,
            weight.mT,
            order,
            offsets,
            top_k=1,
            low=du,
            low_weight=None if a is None else a.mT,
            scatter=True,
        )
        dx = sum_choices(dx, x.shape[0])
    # Where x has one row a token and dy one a pair, the two gather differently; putting dy in sorted order first keeps
    # the kernel at one divisor.
    if need_weight or need_b or need_bias:
        dy = dy.index_select(0, order)
    if need_weight:
        d_weight = weight_gradient(weight, dy, x, order, offsets, top_k_q=rows)
    if need_a and du is not None:
        da = grouped_outer(du, x, order, offsets, top_k_q=rows)
    if need_b:
        db = grouped_outer(dy, low, order, offsets)
    if need_bias:
        d_bias = bias_gradient(dy, order, offsets)
    return [dx, d_weight, da, db, d_bias]
