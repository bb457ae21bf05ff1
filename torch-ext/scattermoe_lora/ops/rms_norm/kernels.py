"""Triton kernels: RMSNorm of whole rows, one pass forward and one backward."""

import triton
import triton.language as tl


@triton.jit
def _place(block, rows, H, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A block's rows, 64-bit, as what is multiplied by them may pass 2^31; its columns; and which of both are there."""
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < H)[None, :]


@triton.jit
def _load(ptr, row, stride, column, mask):
    return tl.load(ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, row, stride, column, value, mask):
    tl.store(ptr + row * stride + column, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    rows,
    H,
    eps,
    offset,
    stride_x,
    stride_r,
    ADD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``x / rms(x) * (weight + offset)`` of ``x``, or of its sum with the residual, which is stored too."""
    row, column, mask = _place(tl.program_id(0), rows, H, ROWS, WIDTH)
    inner = x_ptr.dtype.element_ty
    x = _load(x_ptr, row, stride_x, column, mask)
    if ADD:
        # Rounded as it is stored: the backward normalises the same.
        x = (x + _load(residual_ptr, row, stride_r, column, mask)).to(inner).to(tl.float32)
        _store(total_ptr, row, H, column, x, mask)
    n = x * (1 / tl.sqrt(tl.sum(x * x, axis=1) / H + eps))[:, None]
    if ROUND_FIRST:
        n = n.to(inner).to(tl.float32)
    if WEIGHTED:
        weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32) + offset
        if ROUND_FIRST:
            weight = weight.to(weight_ptr.dtype.element_ty).to(tl.float32)
        n *= weight
    _store(out_ptr, row, H, column, n, mask)


@triton.jit
def rms_backward_kernel(
    dy_ptr,
    d_total_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    d_weight_ptr,
    rows,
    blocks,
    H,
    eps,
    offset,
    stride_y,
    stride_t,
    stride_x,
    ADD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradient of ``x``, and of the weight one sum for each program, ``[programs, H]``: nothing is atomic.

    With ``h = x / rms(x)`` and ``g = dy * (weight + offset)``: ``dw = sum dy * h`` over all rows, and
    ``dx = (g - h * mean(g * h)) / rms(x)``, to which the gradient of the sum is added.
    """
    program = tl.program_id(0)
    summed = tl.zeros((ROWS, WIDTH), tl.float32)
    for block in tl.range(program, blocks, tl.num_programs(0)):
        row, column, mask = _place(block + tl.zeros((), tl.int64), rows, H, ROWS, WIDTH)
        h = _load(x_ptr, row, stride_x, column, mask)
        g = _load(dy_ptr, row, stride_y, column, mask)
        # With eps = 0 a row beyond the last would be 0 / 0, and reach the weight's gradient.
        scale = tl.where(row < rows, (1 / tl.sqrt(tl.sum(h * h, axis=1) / H + eps))[:, None], 0.0)
        h *= scale
        if NEED_WEIGHT:
            summed += g * h
        if NEED_X:
            if WEIGHTED:
                g *= tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32) + offset
            dx = scale * (g - h * (tl.sum(g * h, axis=1) / H)[:, None])
            if ADD:
                dx += _load(d_total_ptr, row, stride_t, column, mask)
            _store(dx_ptr, row, H, column, dx, mask)
    if NEED_WEIGHT:
        column = tl.arange(0, WIDTH)
        tl.store(d_weight_ptr + program.to(tl.int64) * H + column, tl.sum(summed, axis=0), mask=column < H)
