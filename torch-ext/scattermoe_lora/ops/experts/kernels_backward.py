"""Triton kernel: the gradient through the second projection, a grouped GEMM that ends with that of the activation."""

import triton
import triton.language as tl

from ..grouped_linear.kernels import multiply_rows, place
from ..grouped_linear.kernels_schedule import find_tile, program_tile
from .kernels import gate_gradients


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _end_with_gate(
    da,
    weight,
    h_ptr,
    a_ptr,
    dh_ptr,
    row,
    in_tile,
    first,
    I,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the activation and its gradient in ``COLUMNS`` columns from ``first``; returns ``<da, a>`` of each row."""
    column = first + tl.arange(0, COLUMNS)
    mask = in_tile[:, None] & (column < I)[None, :]
    at = row * 2 * I + column[None, :]
    da = da.to(tl.float32)
    gate = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + I + at, mask=mask, other=0.0).to(tl.float32)
    a, d_gate, d_up = gate_gradients(gate, up, da, weight, ACTIVATION, ALPHA, LIMIT, SHIFT)
    dtype = dh_ptr.dtype.element_ty
    tl.store(a_ptr + row * I + column[None, :], a.to(dtype), mask=mask)
    tl.store(dh_ptr + at, d_gate.to(dtype), mask=mask)
    tl.store(dh_ptr + I + at, d_up.to(dtype), mask=mask)
    return tl.sum(tl.where(mask, da * a, 0.0), axis=1)


@triton.jit
def matmul_gate_backward_kernel(
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
    h_ptr,
    row_weight_ptr,
    a_ptr,
    dh_ptr,
    d_row_weight_ptr,
    GATHER: tl.constexpr,
    TOP_K: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    LIBRARY: tl.constexpr,
    SCHEDULE: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``a`` and ``dh`` of :func:`gate_backward_kernel` for a tile of ``da``, which is not written, where gate and up
    lie one behind the other in ``h``.

    ``d_row_weight`` is ``[pairs, tiles of N]`` here, a sum for each tile of columns.
    """
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
            LOW_RANK, BIAS, LIBRARY, TMA, TMA_ROWS, PRECISION, EVEN_K, False, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
        )
        # fmt: on
    weight = tl.load(row_weight_ptr + pair, mask=in_tile, other=0.0).to(tl.float32)[:, None]
    out_row = position.to(tl.int64)[:, None]
    # Rounded as it would be written; and a quarter at a time, for which there are registers beside the product's.
    left, right = _halves(acc.to(a_ptr.dtype.element_ty), BLOCK_M, BLOCK_N)
    quarters = _halves(left, BLOCK_M, BLOCK_N // 2) + _halves(right, BLOCK_M, BLOCK_N // 2)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for quarter in tl.static_range(4):
        first = pid_n * BLOCK_N + quarter * (BLOCK_N // 4)
        # fmt: off
        total += _end_with_gate(
            quarters[quarter], weight, h_ptr, a_ptr, dh_ptr, out_row, in_tile, first, N, ACTIVATION, ALPHA, LIMIT,
            SHIFT, BLOCK_N // 4,
        )
        # fmt: on
    tl.store(d_row_weight_ptr + pair * tl.cdiv(N, BLOCK_N) + pid_n, total, mask=in_tile)
