"""Triton kernels: grouped GEMMs that gather and scatter rows by index.

The scatter/gather formulation follows Tan et al., *Scattered Mixture-of-Experts Implementation* (2024): rows are read
from where they stand and written to where they belong, so that neither a gathered nor a padded copy of the hidden
states is made. The low-rank path ``U B^T`` is a second, short K loop into the same accumulator.
"""

import triton
import triton.language as tl

from .kernels_schedule import find_tile, program_tile, read_tile, tile_at


@triton.jit
def _multiply_step(acc, u_tile, b_tile, in_tile, in_n, in_r, PRECISION: tl.constexpr):
    u = tl.load(u_tile, mask=in_tile[:, None] & in_r[None, :], other=0.0)
    b = tl.load(b_tile, mask=in_r[:, None] & in_n[None, :], other=0.0)
    return tl.dot(u, b, acc, input_precision=PRECISION)


@triton.jit
def add_low_rank_and_bias(
    acc,
    u_ptr,
    b_ptr,
    bias_ptr,
    e,
    position,
    in_tile,
    n,
    in_n,
    N,
    R,
    stride_be,
    stride_bn,
    stride_br,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SHORT_RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``acc (+ u B[e]^T) (+ bias[e])`` of a tile of rows and columns ``n``; ``e`` is 64-bit.

    ``SHORT_RANK`` promises that the rank is at most ``BLOCK_R``.
    """
    if LOW_RANK:
        r = tl.arange(0, BLOCK_R)
        u_tile = u_ptr + position[:, None].to(tl.int64) * R + r[None, :]
        b_tile = (
            b_ptr + e * stride_be + n[None, :].to(tl.int64) * stride_bn + r[:, None].to(tl.int64) * stride_br
        )
        if SHORT_RANK:
            acc = _multiply_step(acc, u_tile, b_tile, in_tile, in_n, r < R, PRECISION)
        else:
            for r0 in range(0, R, BLOCK_R):
                acc = _multiply_step(acc, u_tile, b_tile, in_tile, in_n, r0 + r < R, PRECISION)
                u_tile += BLOCK_R
                b_tile += BLOCK_R * stride_br
    if BIAS:
        bias = tl.load(bias_ptr + e * N + n, mask=in_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def multiply_rows(
    x_ptr,
    w_ptr,
    u_ptr,
    b_ptr,
    bias_ptr,
    expert,
    position,
    pair,
    in_tile,
    first_row,
    first_n,
    n,
    in_n,
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
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    LIBRARY: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    SHORT_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``x[row] W[expert]^T (+ u B[expert]^T) (+ bias[expert])`` of a tile of rows and columns ``n``, in float32.

    ``LIBRARY`` tells that ``x`` holds the base product itself, in sorted order; nothing is read of the weight then.
    ``TMA`` is ``K`` or ``N``, along which the weight behind the descriptor ``w_ptr`` is contiguous, or empty. With
    ``TMA_ROWS`` ``x_ptr`` is a descriptor, too, of rows in sorted order; those behind the tile's last are another's.
    """
    if LIBRARY:
        base_tile = x_ptr + position[:, None].to(tl.int64) * stride_xm + n[None, :]
        acc = tl.load(base_tile, mask=in_tile[:, None] & in_n[None, :], other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    k = tl.arange(0, BLOCK_K)
    # 64-bit from here on: a stack of experts passes 2^31 elements, and so does a matrix of rows.
    e = expert.to(tl.int64)
    if not TMA_ROWS:
        x_row = (pair // TOP_K if GATHER else position).to(tl.int64)
        x_tile = x_ptr + x_row[:, None] * stride_xm + k[None, :]
    if not TMA:
        w_tile = (
            w_ptr + e * stride_we + n[None, :].to(tl.int64) * stride_wn + k[:, None].to(tl.int64) * stride_wk
        )
    for k0 in range(0, 0 if LIBRARY else K, BLOCK_K):
        # What lies outside of what a descriptor describes is zero without a mask.
        if TMA_ROWS:
            x = x_ptr.load([first_row.to(tl.int32), k0])
        elif EVEN_K:
            x = tl.load(x_tile, mask=in_tile[:, None], other=0.0)
        else:
            x = tl.load(x_tile, mask=in_tile[:, None] & (k0 + k < K)[None, :], other=0.0)
        if TMA == "N":
            w = w_ptr.load([expert, k0, first_n]).reshape(BLOCK_K, BLOCK_N)
        elif TMA == "K":
            w = w_ptr.load([expert, 0, first_n, k0]).reshape(BLOCK_N, BLOCK_K).T
        elif EVEN_K:
            w = tl.load(w_tile, mask=in_n[None, :], other=0.0)
        else:
            w = tl.load(w_tile, mask=(k0 + k < K)[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if not TMA_ROWS:
            x_tile += BLOCK_K
        if not TMA:
            w_tile += BLOCK_K * stride_wk
    # fmt: off
    return add_low_rank_and_bias(
        acc, u_ptr, b_ptr, bias_ptr, e, position, in_tile, n, in_n, N, R, stride_be, stride_bn, stride_br,
        LOW_RANK, BIAS, PRECISION, SHORT_RANK, BLOCK_R,
    )
    # fmt: on


@triton.jit
def place(order_ptr, row, end, pid_n, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions, pairs and columns of a tile, and which of them are in it: ``(position, pair, in_tile, n, in_n)``."""
    position = row + tl.arange(0, BLOCK_M)
    in_tile = position < end
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return position, tl.load(order_ptr + position, mask=in_tile, other=0), in_tile, n, n < N


@triton.jit
def store(acc, out_ptr, N, position, pair, in_tile, n, in_n, SCATTER: tl.constexpr):
    out_row = (pair if SCATTER else position).to(tl.int64)
    out_tile = out_ptr + out_row[:, None] * N + n[None, :]
    tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=in_tile[:, None] & in_n[None, :])


@triton.jit
def grouped_matmul_kernel(
    x_ptr,
    w_ptr,
    u_ptr,
    b_ptr,
    bias_ptr,
    order_ptr,
    offsets_ptr,
    schedule_ptr,
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
    row_weight_ptr,
    out_ptr,
    GATHER: tl.constexpr,
    TOP_K: tl.constexpr,
    SCATTER: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LIBRARY: tl.constexpr,
    SCHEDULE: tl.constexpr,
    PERSISTENT: tl.constexpr,
    FLATTEN: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    SHORT_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile of the product a program, or with ``PERSISTENT`` every ``num_programs``-th tile of the schedule.

    ``FLATTEN`` makes one loop over the steps of all its tiles, so that a tile's first loads begin before the last ends.
    """
    if PERSISTENT:
        tiles_n = tl.cdiv(N, BLOCK_N)
        of_experts = tl.load(schedule_ptr)
        tiles = tl.load(schedule_ptr + 1)
        for index in tl.range(tl.program_id(0), of_experts * tiles_n, tl.num_programs(0), flatten=FLATTEN):
            pid_m, pid_n = tile_at(index, of_experts, tiles_n, GROUP_M)
            expert, row, end = read_tile(schedule_ptr, pid_m)
            position, pair, in_tile, n, in_n = place(order_ptr, row, end, pid_n, N, BLOCK_M, BLOCK_N)
            # fmt: off
            acc = multiply_rows(
                x_ptr, w_ptr, u_ptr, b_ptr, bias_ptr, expert, position, pair, in_tile, row, pid_n * BLOCK_N, n, in_n,
                N, K, R, stride_xm, stride_we, stride_wn, stride_wk, stride_be, stride_bn, stride_br, GATHER, TOP_K,
                LOW_RANK, BIAS, LIBRARY, TMA, TMA_ROWS, PRECISION, EVEN_K, SHORT_RANK, BLOCK_M, BLOCK_N, BLOCK_K,
                BLOCK_R,
            )
            # fmt: on
            if WEIGHTED:
                acc *= tl.load(row_weight_ptr + pair, mask=in_tile, other=0.0).to(tl.float32)[:, None]
            store(acc, out_ptr, N, position, pair, in_tile, n, in_n, SCATTER)
        # Pairs without an expert apart: with a condition around the product nothing can be flattened.
        for index in range(of_experts * tiles_n + tl.program_id(0), tiles * tiles_n, tl.num_programs(0)):
            expert, row, end = read_tile(schedule_ptr, index // tiles_n)
            position, pair, in_tile, n, in_n = place(
                order_ptr, row, end, index % tiles_n, N, BLOCK_M, BLOCK_N
            )
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            store(acc, out_ptr, N, position, pair, in_tile, n, in_n, SCATTER)
    else:
        pid_m, pid_n = program_tile(N, BLOCK_N, GROUP_M)
        expert, row, end = find_tile(
            pid_m, offsets_ptr, schedule_ptr, pairs, num_experts, SCHEDULE, EXPERTS_POW2, BLOCK_M
        )
        if row >= end:
            return
        position, pair, in_tile, n, in_n = place(order_ptr, row, end, pid_n, N, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if expert < num_experts:
            # fmt: off
            acc = multiply_rows(
                x_ptr, w_ptr, u_ptr, b_ptr, bias_ptr, expert, position, pair, in_tile, row, pid_n * BLOCK_N, n, in_n,
                N, K, R, stride_xm, stride_we, stride_wn, stride_wk, stride_be, stride_bn, stride_br, GATHER, TOP_K,
                LOW_RANK, BIAS, LIBRARY, TMA, TMA_ROWS, PRECISION, EVEN_K, SHORT_RANK, BLOCK_M, BLOCK_N, BLOCK_K,
                BLOCK_R,
            )
            # fmt: on
            if WEIGHTED:
                acc *= tl.load(row_weight_ptr + pair, mask=in_tile, other=0.0).to(tl.float32)[:, None]
        store(acc, out_ptr, N, position, pair, in_tile, n, in_n, SCATTER)
