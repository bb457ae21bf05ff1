"""Triton kernel: the grouped GEMM with a quantized weight, each tile of which is decoded as it is read.

The product is that of ``grouped_matmul_kernel`` over the decoded weight, rounded to the dtype of the rows first.
"""

import triton
import triton.language as tl

from ..quantization.kernels import decode_scale, decode_tile, load_tile
from .kernels import add_low_rank_and_bias, place, store
from .kernels_schedule import find_tile, program_tile


@triton.jit
def quantized_matmul_kernel(
    x_ptr,
    codes_ptr,
    values_ptr,
    scale_ptr,
    factor_ptr,
    nested_values_ptr,
    nested_ptr,
    offset_ptr,
    u_ptr,
    b_ptr,
    bias_ptr,
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
    stride_se,
    stride_sn,
    stride_sk,
    stride_f,
    stride_be,
    stride_bn,
    stride_br,
    BITS: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATHER: tl.constexpr,
    TOP_K: tl.constexpr,
    SCATTER: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of the product a program. A stored matrix is ``[N, K]``, or with ``TRANSPOSED`` ``[K, N]``."""
    pid_m, pid_n = program_tile(N, BLOCK_N, 1)
    expert, row, end = find_tile(
        pid_m, offsets_ptr, offsets_ptr, pairs, num_experts, False, EXPERTS_POW2, BLOCK_M
    )
    if row >= end:
        return
    position, pair, in_tile, n, in_n = place(order_ptr, row, end, pid_n, N, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first_n = pid_n * BLOCK_N
    STORED_N, STORED_K = (K, N) if TRANSPOSED else (N, K)
    TILE_N: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
    TILE_K: tl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    if expert < num_experts:
        k = tl.arange(0, BLOCK_K)
        e = expert.to(tl.int64)
        x_row = (pair // TOP_K if GATHER else position).to(tl.int64)
        x_tile = x_ptr + x_row[:, None] * stride_xm + k[None, :]
        # A step's codes, scales and rows are read while the step before is multiplied.
        # fmt: off
        word, scale, shared = load_tile(
            codes_ptr, scale_ptr, nested_ptr, e,
            0 if TRANSPOSED else first_n, first_n if TRANSPOSED else 0, STORED_N, STORED_K,
            stride_se, stride_sn, stride_sk, BITS, RUN, ROWS, COLUMNS, NESTED, TILE_N, TILE_K,
        )
        x = tl.load(x_tile, mask=in_tile[:, None] & (k < K)[None, :], other=0.0)
        for k0 in range(BLOCK_K, K + BLOCK_K, BLOCK_K):
            x_tile += BLOCK_K
            next_x = tl.load(x_tile, mask=in_tile[:, None] & (k0 + k < K)[None, :], other=0.0)
            next_word, next_scale, next_shared = load_tile(
                codes_ptr, scale_ptr, nested_ptr, e,
                k0 if TRANSPOSED else first_n, first_n if TRANSPOSED else k0, STORED_N, STORED_K,
                stride_se, stride_sn, stride_sk, BITS, RUN, ROWS, COLUMNS, NESTED, TILE_N, TILE_K,
            )
            scale = decode_scale(
                scale, shared, factor_ptr, nested_values_ptr, offset_ptr, e, stride_f, NESTED, SCALE, FACTOR
            )
            w = decode_tile(word, scale, values_ptr, BITS, HIGH_FIRST, RUN, TILE_N, TILE_K)
            w = w.to(x.dtype).reshape(TILE_N, TILE_K)
            acc = tl.dot(x, w if TRANSPOSED else w.T, acc, input_precision=PRECISION)
            x, word, scale, shared = next_x, next_word, next_scale, next_shared
        acc = add_low_rank_and_bias(
            acc, u_ptr, b_ptr, bias_ptr, e, position, in_tile, n, in_n, N, R, stride_be, stride_bn, stride_br,
            LOW_RANK, BIAS, PRECISION, False, BLOCK_R,
        )
        # fmt: on
        if WEIGHTED:
            # Read anew: kept through the loop, it is one register too many for a format (MXFP8, on sm_90).
            pair = tl.load(order_ptr + position, mask=in_tile, other=0)
            acc *= tl.load(row_weight_ptr + pair, mask=in_tile, other=0.0).to(tl.float32)[:, None]
    store(acc, out_ptr, N, position, pair, in_tile, n, in_n, SCATTER)
