"""Triton kernel: the sum of each expert's outer products, the gradient of a matrix that an expert has."""

import triton
import triton.language as tl


@triton.jit
def grouped_outer_kernel(
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
