"""Triton implementation: grouped GEMMs that gather and scatter rows by index.

The scatter/gather formulation follows Tan et al., *Scattered Mixture-of-Experts Implementation* (2024): rows are read
from where they stand and written to where they belong, so that neither a gathered nor a padded copy of the hidden
states is made. The low-rank path ``U B^T`` is a second, short K loop into the same accumulator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _find_tile(pid_m, offsets_ptr, pairs, num_experts, EXPERTS_POW2: tl.constexpr, BLOCK_M: tl.constexpr):
    """The segment and rows of one M tile: ``(segment, start, end)``.

    Segments are the experts, then the pairs without an expert here (segment ``num_experts``). A tile never spans two
    segments. A ``pid_m`` past the last tile gives an empty range. Each program counts all tiles itself: a few dozen
    loads that hit the cache, against a schedule that another kernel would have to write first.
    """
    segment = tl.arange(0, EXPERTS_POW2)
    start = tl.load(offsets_ptr + segment, mask=segment <= num_experts, other=0)
    end = tl.load(offsets_ptr + segment + 1, mask=segment < num_experts, other=0)
    end = tl.where(segment == num_experts, pairs, end)
    tiles = tl.where(segment <= num_experts, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    tiles_through = tl.cumsum(tiles, axis=0)
    found = tl.sum(((tiles_through <= pid_m) & (segment <= num_experts)).to(tl.int32), axis=0)
    is_found = segment == found
    first_tile = tl.sum(tl.where(is_found, tiles_through - tiles, 0), axis=0)
    row = tl.sum(tl.where(is_found, start, 0), axis=0) + (pid_m - first_tile) * BLOCK_M
    return found, row, tl.sum(tl.where(is_found, end, 0), axis=0)


@triton.jit
def _grouped_matmul_kernel(
    x_ptr,
    w_ptr,
    u_ptr,
    b_ptr,
    row_weight_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    pairs,
    num_experts,
    N,
    K,
    R,
    stride_xm,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    stride_br,
    GATHER: tl.constexpr,
    TOP_K: tl.constexpr,
    SCATTER: tl.constexpr,
    LOW_RANK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    expert, row, end = _find_tile(
        pid // tiles_n, offsets_ptr, pairs, num_experts, EXPERTS_POW2, BLOCK_M
    )
    if row >= end:
        return
    position = row + tl.arange(0, BLOCK_M)
    in_tile = position < end
    pair = tl.load(order_ptr + position, mask=in_tile, other=0)
    n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if expert < num_experts:
        # 64-bit from here on: a stack of experts passes 2^31 elements.
        x_row = (pair // TOP_K if GATHER else position).to(tl.int64)
        x_tile = x_ptr + x_row[:, None] * stride_xm + k[None, :]
        w_tile = w_ptr + expert.to(tl.int64) * stride_we + n[None, :].to(tl.int64) * stride_wn
        w_tile = w_tile + k[:, None].to(tl.int64) * stride_wk
        for k0 in range(0, K, BLOCK_K):
            in_k = k0 + k < K
            x = tl.load(x_tile, mask=in_tile[:, None] & in_k[None, :], other=0.0)
            w = tl.load(w_tile, mask=in_k[:, None] & (n[None, :] < N), other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            x_tile += BLOCK_K
            w_tile += BLOCK_K * stride_wk
        if LOW_RANK:
            u_tile = u_ptr + position[:, None].to(tl.int64) * R + k[None, :]
            b_tile = b_ptr + expert.to(tl.int64) * stride_be + n[None, :] * stride_bn + k[:, None] * stride_br
            for r0 in range(0, R, BLOCK_K):
                in_r = r0 + k < R
                u = tl.load(u_tile, mask=in_tile[:, None] & in_r[None, :], other=0.0)
                b = tl.load(b_tile, mask=in_r[:, None] & (n[None, :] < N), other=0.0)
                acc = tl.dot(u, b, acc, input_precision=PRECISION)
                u_tile += BLOCK_K
                b_tile += BLOCK_K * stride_br
        if WEIGHTED:
            acc *= tl.load(row_weight_ptr + pair, mask=in_tile, other=0.0).to(tl.float32)[:, None]

    out_row = (pair if SCATTER else position).to(tl.int64)
    out_tile = out_ptr + out_row[:, None] * N + n[None, :]
    tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=in_tile[:, None] & (n[None, :] < N))


@triton.jit
def _grouped_outer_kernel(
    p_ptr,
    q_ptr,
    row_weight_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    N_P,
    N_Q,
    stride_p,
    stride_q,
    GATHER_P: tl.constexpr,
    GATHER_Q: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    p_col = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    q_col = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros((BLOCK_P, BLOCK_Q), dtype=tl.float32)
    # One program sums all rows of its expert in order: the same bits every time, and no atomics.
    for s0 in range(start, end, BLOCK_S):
        position = s0 + tl.arange(0, BLOCK_S)
        in_rows = position < end
        pair = tl.load(order_ptr + position, mask=in_rows, other=0)
        p_row = (pair // TOP_K if GATHER_P else position).to(tl.int64)
        q_row = (pair // TOP_K if GATHER_Q else position).to(tl.int64)
        p = tl.load(
            p_ptr + p_row[None, :] * stride_p + p_col[:, None],
            mask=in_rows[None, :] & (p_col[:, None] < N_P),
            other=0.0,
        )
        q = tl.load(
            q_ptr + q_row[:, None] * stride_q + q_col[None, :],
            mask=in_rows[:, None] & (q_col[None, :] < N_Q),
            other=0.0,
        )
        if WEIGHTED:
            weight = tl.load(row_weight_ptr + pair, mask=in_rows, other=0.0).to(tl.float32)
            q = (q.to(tl.float32) * weight[:, None]).to(q_ptr.dtype.element_ty)
        acc = tl.dot(p, q, acc, input_precision=PRECISION)
    out_tile = out_ptr + expert * N_P * N_Q + p_col[:, None].to(tl.int64) * N_Q + q_col[None, :]
    tl.store(
        out_tile,
        acc.to(out_ptr.dtype.element_ty),
        mask=(p_col[:, None] < N_P) & (q_col[None, :] < N_Q),
    )


def _precision() -> str:
    """Full float32 unless the user allowed TF32, with the switch that torch's own matmul follows."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _block(size: int, largest: int) -> int:
    """A power of two for ``size`` columns, at least 16 because that is the smallest side of a ``tl.dot``."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    *,
    top_k: int | None = None,
    low: torch.Tensor | None = None,
    low_weight: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    scatter: bool = False,
) -> torch.Tensor:
    """``x[row] W[e]^T (+ low[s] C[e]^T)`` for every pair.

    Args:
        x: Rows: ``[S, N_in]`` in sorted order if ``top_k`` is None, else the row of pair p is ``p // top_k``
            (``top_k=1``: by pair).
        weight: ``[E, N_out, N_in]``, any strides (a transposed view serves the backward).
        low, low_weight: ``[S, r]`` in sorted order and ``[E, N_out, r]``, any strides; or None.
        row_weight: ``[S]`` by pair, multiplies the result; or None.
        scatter: Write by pair instead of in sorted order.

    Returns:
        ``[S, N_out]``; zero for pairs without an expert here.
    """
    num_experts, n_out, n_in = weight.shape
    pairs = order.shape[0]
    out = x.new_empty((pairs, n_out))
    if pairs == 0:
        return out
    block_m = 16 if pairs <= 16 * num_experts else 64
    block_n, block_k = _block(n_out, 64), _block(n_in, 32)
    tiles_m = pairs // block_m + min(pairs, num_experts + 1)
    low_strides = (0, 0, 0) if low_weight is None else low_weight.stride()
    _grouped_matmul_kernel[(tiles_m * triton.cdiv(n_out, block_n),)](
        x,
        weight,
        x if low is None else low,
        weight if low_weight is None else low_weight,
        x if row_weight is None else row_weight,
        out,
        order,
        offsets,
        pairs,
        num_experts,
        n_out,
        n_in,
        0 if low is None else low.shape[1],
        x.stride(0),
        *weight.stride(),
        *low_strides,
        GATHER=top_k is not None,
        TOP_K=top_k or 1,
        SCATTER=scatter,
        LOW_RANK=low is not None,
        WEIGHTED=row_weight is not None,
        EXPERTS_POW2=triton.next_power_of_2(num_experts + 1),
        PRECISION=_precision(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
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
    block_p, block_q = _block(n_p, 64), _block(n_q, 64)
    _grouped_outer_kernel[(triton.cdiv(n_q, block_q), triton.cdiv(n_p, block_p), num_experts)](
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
        PRECISION=_precision(),
        BLOCK_P=block_p,
        BLOCK_Q=block_q,
        BLOCK_S=32,
        num_warps=4,
    )
    return out


def sum_choices(by_pair: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[S, N]`` by pair to ``[T, N]``: each token's rows summed in float32, in a fixed order."""
    return by_pair.view(tokens, -1, by_pair.shape[1]).sum(dim=1)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.grouped_linear.op.grouped_linear_forward`."""
    rows = 1 if x.shape[0] == order.shape[0] else top_k
    low = x.new_empty((order.shape[0], 0)) if a is None else grouped_matmul(x, a, order, offsets, top_k=rows)
    y = grouped_matmul(
        x, weight, order, offsets, top_k=rows, low=None if a is None else low, low_weight=b, scatter=True
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
    low: torch.Tensor,
    top_k: int,
    needs: list[bool],
) -> list[torch.Tensor | None]:
    """See :func:`scattermoe_lora.grouped_linear.op.grouped_linear_backward`."""
    need_x, need_weight, need_a, need_b = needs
    rows = 1 if x.shape[0] == order.shape[0] else top_k
    du = None if a is None or b is None else grouped_matmul(dy, b.mT, order, offsets, top_k=1)
    dx = d_weight = da = db = None
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
    if need_weight or need_b:
        dy = dy.index_select(0, order)
    if need_weight:
        d_weight = grouped_outer(dy, x, order, offsets, top_k_q=rows)
    if need_a and du is not None:
        da = grouped_outer(du, x, order, offsets, top_k_q=rows)
    if need_b:
        db = grouped_outer(dy, low, order, offsets)
    return [dx, d_weight, da, db]
