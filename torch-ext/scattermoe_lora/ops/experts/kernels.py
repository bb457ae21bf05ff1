"""Triton kernels: the grouped GEMM that ends with the gated activation, the activation alone, and its gradient."""

import triton
import triton.language as tl

from ..gated_activation.kernels import activation
from ..grouped_linear.kernels import multiply_rows
from ..grouped_linear.kernels_schedule import find_tile, program_tile


@triton.jit
def _gated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """``(value, d value / d gate, factor, d factor / d up)`` of ``value(gate) * factor(up)``, all float32."""
    # An early return would leave the rest to be compiled all the same, with a limit of None.
    if LIMIT is None:
        value, slope = activation(gate, ACTIVATION, ALPHA)
        factor = up + SHIFT
        passes = tl.full(up.shape, 1.0, tl.float32)
    else:
        # Comparisons, not minimum and maximum: these would lose a NaN. It is within no bounds, and gets no gradient.
        value, slope = activation(tl.where(gate > LIMIT, LIMIT, gate), ACTIVATION, ALPHA)
        slope = tl.where(gate <= LIMIT, slope, 0.0)
        factor = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + SHIFT
        passes = tl.where(tl.abs(up) <= LIMIT, 1.0, 0.0)
    return value, slope, factor, passes


@triton.jit
def gate_gradients(
    gate,
    up,
    da,
    weight,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """``(a, d_gate, d_up)``: the activation, and what comes through it of ``da``, the gradient before the routing
    ``weight``; all float32."""
    value, slope, factor, passes = _gated(gate, up, ACTIVATION, ALPHA, LIMIT, SHIFT)
    weighted = da * weight
    d_gate, d_up = weighted * factor * slope, weighted * value * passes
    if LIMIT is not None:
        # Nothing comes through a clamp, and of a NaN times zero a NaN would.
        d_gate = tl.where(slope != 0.0, d_gate, 0.0)
        d_up = tl.where(passes != 0.0, d_up, 0.0)
    return value * factor, d_gate, d_up


@triton.jit
def gate_up_kernel(
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
    hidden_ptr,
    a_ptr,
    GATHER: tl.constexpr,
    TOP_K: tl.constexpr,
    LOW_RANK: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
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
    """The gated activation of a product, ``[pairs, N / 2]``, and if ``KEEP`` the product itself, ``[pairs, N]``.

    One accumulator holds a tile's columns of gate and of up, so that it is as large as another product's.
    """
    I = N // 2
    HALF: tl.constexpr = BLOCK_N // 2
    pid_m, pid_n = program_tile(I, HALF, GROUP_M)
    expert, row, end = find_tile(
        pid_m, offsets_ptr, schedule_ptr, pairs, num_experts, SCHEDULE, EXPERTS_POW2, BLOCK_M
    )
    if row >= end:
        return
    position = row + tl.arange(0, BLOCK_M)
    in_tile = position < end
    pair = tl.load(order_ptr + position, mask=in_tile, other=0)
    j = tl.arange(0, BLOCK_N)
    if INTERLEAVED:
        first_n = pid_n * BLOCK_N
        n = first_n + j
        in_n = n < N
    else:
        first_n = pid_n * HALF
        of_gate = first_n + j % HALF
        n = (j // HALF) * I + of_gate
        in_n = of_gate < I
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if expert < num_experts:
        # fmt: off
        acc = multiply_rows(
            x_ptr, w_ptr, u_ptr, b_ptr, bias_ptr, expert, position, pair, in_tile, row, first_n, n, in_n,
            N, K, R, stride_xm, stride_we, stride_wn, stride_wk, stride_be, stride_bn, stride_br,
            GATHER, TOP_K, LOW_RANK, BIAS, LIBRARY, TMA, TMA_ROWS, PRECISION, EVEN_K, False, BLOCK_M, BLOCK_N, BLOCK_K,
            BLOCK_R,
        )
        # fmt: on
    # Rounded as it is kept: the backward computes the same activation from it, to the bit.
    h = acc.to(a_ptr.dtype.element_ty)
    out_row = position.to(tl.int64)[:, None]
    if KEEP:
        tl.store(hidden_ptr + out_row * N + n[None, :], h, mask=in_tile[:, None] & in_n[None, :])
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(h, (BLOCK_M, HALF, 2)))
    else:
        gate, up = tl.split(tl.permute(tl.reshape(h, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    value, _, factor, _ = _gated(gate.to(tl.float32), up.to(tl.float32), ACTIVATION, ALPHA, LIMIT, SHIFT)
    column = pid_n * HALF + tl.arange(0, HALF)
    a_tile = a_ptr + out_row * I + column[None, :]
    tl.store(a_tile, (value * factor).to(h.dtype), mask=in_tile[:, None] & (column < I)[None, :])


@triton.jit
def gate_forward_kernel(
    h_ptr,
    a_ptr,
    I,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gated activation of ``BLOCK`` columns of a row of ``[pairs, 2I]``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < I
    at = h_ptr + row * 2 * I + column * (2 if INTERLEAVED else 1)
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + (1 if INTERLEAVED else I), mask=mask, other=0.0).to(tl.float32)
    value, _, factor, _ = _gated(gate, up, ACTIVATION, ALPHA, LIMIT, SHIFT)
    tl.store(a_ptr + row * I + column, (value * factor).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(
    da_ptr,
    h_ptr,
    row_weight_ptr,
    order_ptr,
    a_ptr,
    dh_ptr,
    d_row_weight_ptr,
    I,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``da`` is the gradient before the routing weight: ``<da, a>`` is then the routing weight's own gradient."""
    position = tl.program_id(0)
    row = position.to(tl.int64)
    pair = tl.load(order_ptr + position)
    weight = tl.load(row_weight_ptr + pair).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, I, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < I
        da = tl.load(da_ptr + row * I + column, mask=mask, other=0.0).to(tl.float32)
        at = row * 2 * I + column * (2 if INTERLEAVED else 1)
        gate = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + at + (1 if INTERLEAVED else I), mask=mask, other=0.0).to(tl.float32)
        a, d_gate, d_up = gate_gradients(gate, up, da, weight, ACTIVATION, ALPHA, LIMIT, SHIFT)
        total += tl.where(mask, da * a, 0.0)
        dtype = dh_ptr.dtype.element_ty
        tl.store(a_ptr + row * I + column, a.to(dtype), mask=mask)
        tl.store(dh_ptr + at, d_gate.to(dtype), mask=mask)
        tl.store(dh_ptr + at + (1 if INTERLEAVED else I), d_up.to(dtype), mask=mask)
    tl.store(d_row_weight_ptr + pair, tl.sum(total, axis=0))
