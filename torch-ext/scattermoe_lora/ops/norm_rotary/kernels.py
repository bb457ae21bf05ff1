"""Triton kernels: RMSNorm with rotary embedding, one pass over the rows forward and one backward.

A row is one head of one token. It is held as three parts: the two halves of its rotated columns, whose products with
cosine and sine make each other's results, and the rest, which is not rotated. A part may have no columns.
"""

import triton
import triton.language as tl


@triton.jit
def _place(block, blocks, rows, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """``(batch, token, head, valid)`` of the rows of a block, 64-bit, as what is multiplied by them may pass 2^31.

    ``rows`` is the number of rows of one batch entry, ``blocks`` that of its blocks.
    """
    batch = (block // blocks).to(tl.int64)
    row = (block % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return batch, row // HEADS, row % HEADS, row < rows


@triton.jit
def _load(ptr, at, first, valid, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    """Columns ``[first, first + LENGTH)`` of the rows at ``at``, float32 ``[BLOCK, WIDTH]``, zero beyond."""
    column = tl.arange(0, WIDTH)
    mask = valid[:, None] & (column < LENGTH)[None, :]
    return tl.load(ptr + at[:, None] + (first + column)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, at, first, valid, value, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    mask = valid[:, None] & (column < LENGTH)[None, :]
    tl.store(ptr + at[:, None] + (first + column)[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_columns(ptr, first, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of the weight, float32 ``[1, WIDTH]``."""
    column = tl.arange(0, WIDTH)
    return tl.load(ptr + first + column, mask=column < LENGTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def rotary_forward_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rows,
    blocks,
    eps,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_cb,
    stride_cs,
    stride_sb,
    stride_ss,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    D: tl.constexpr = 2 * HALF + REST
    batch, token, head, valid = _place(tl.program_id(0), blocks, rows, HEADS, BLOCK)
    at = batch * stride_xb + token * stride_xs + head * stride_xh
    to = (batch * rows + token * HEADS + head) * D
    squares = tl.zeros((BLOCK,), tl.float32)
    if HALF > 0:
        x1 = _load(x_ptr, at, 0, valid, HALF, HALF_WIDTH)
        x2 = _load(x_ptr, at, HALF, valid, HALF, HALF_WIDTH)
        squares += tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
    if REST > 0:
        x3 = _load(x_ptr, at, 2 * HALF, valid, REST, REST_WIDTH)
        squares += tl.sum(x3 * x3, axis=1)
    scale = (1 / tl.sqrt(squares / D + eps))[:, None]
    # The norm's result is rounded before it is rotated, and each product before the sum, as in the model's own code.
    inner = x_ptr.dtype.element_ty
    outer = out_ptr.dtype.element_ty
    if HALF > 0:
        n1 = x1 * scale
        n2 = x2 * scale
        if WEIGHTED:
            n1 *= _load_columns(weight_ptr, 0, HALF, HALF_WIDTH)
            n2 *= _load_columns(weight_ptr, HALF, HALF, HALF_WIDTH)
        n1 = n1.to(inner).to(tl.float32)
        n2 = n2.to(inner).to(tl.float32)
        c_at = batch * stride_cb + token * stride_cs
        s_at = batch * stride_sb + token * stride_ss
        c1 = _load(cos_ptr, c_at, 0, valid, HALF, HALF_WIDTH)
        c2 = _load(cos_ptr, c_at, HALF, valid, HALF, HALF_WIDTH)
        s1 = _load(sin_ptr, s_at, 0, valid, HALF, HALF_WIDTH)
        s2 = _load(sin_ptr, s_at, HALF, valid, HALF, HALF_WIDTH)
        y1 = (n1 * c1).to(outer).to(tl.float32) - (n2 * s1).to(outer).to(tl.float32)
        y2 = (n2 * c2).to(outer).to(tl.float32) + (n1 * s2).to(outer).to(tl.float32)
        _store(out_ptr, to, 0, valid, y1, HALF, HALF_WIDTH)
        _store(out_ptr, to, HALF, valid, y2, HALF, HALF_WIDTH)
    if REST > 0:
        n3 = x3 * scale
        if WEIGHTED:
            n3 *= _load_columns(weight_ptr, 2 * HALF, REST, REST_WIDTH)
        _store(out_ptr, to, 2 * HALF, valid, n3.to(inner), REST, REST_WIDTH)


@triton.jit
def rotary_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    d_weight_ptr,
    rows,
    blocks,
    all_blocks,
    eps,
    stride_yb,
    stride_ys,
    stride_yh,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_cb,
    stride_cs,
    stride_sb,
    stride_ss,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of ``x``, and of the weight one sum for each program, ``[programs, D]``: nothing is atomic.

    With ``g`` the gradient turned back and ``h = x * scale``: ``dw = sum g * h`` over all rows, and
    ``dx = scale * (g * w - h * mean(g * w * h))``.
    """
    D: tl.constexpr = 2 * HALF + REST
    program = tl.program_id(0).to(tl.int64)
    if HALF > 0:
        dw1 = tl.zeros((BLOCK, HALF_WIDTH), tl.float32)
        dw2 = tl.zeros((BLOCK, HALF_WIDTH), tl.float32)
    if REST > 0:
        dw3 = tl.zeros((BLOCK, REST_WIDTH), tl.float32)
    for block in range(program, all_blocks, tl.num_programs(0)):
        # A division of 32 bits, not of the 64 that the loop counts in; the interpreter counts in Python's integers.
        narrow = (block + tl.zeros((), tl.int64)).to(tl.int32)
        batch, token, head, valid = _place(narrow, blocks, rows, HEADS, BLOCK)
        y_at = batch * stride_yb + token * stride_ys + head * stride_yh
        x_at = batch * stride_xb + token * stride_xs + head * stride_xh
        to = (batch * rows + token * HEADS + head) * D
        squares = tl.zeros((BLOCK,), tl.float32)
        product = tl.zeros((BLOCK,), tl.float32)
        if HALF > 0:
            h1 = _load(x_ptr, x_at, 0, valid, HALF, HALF_WIDTH)
            h2 = _load(x_ptr, x_at, HALF, valid, HALF, HALF_WIDTH)
            squares += tl.sum(h1 * h1, axis=1) + tl.sum(h2 * h2, axis=1)
        if REST > 0:
            h3 = _load(x_ptr, x_at, 2 * HALF, valid, REST, REST_WIDTH)
            squares += tl.sum(h3 * h3, axis=1)
        # With eps = 0 a row beyond the last would be 0 / 0, and reach the weight's gradient.
        scale = tl.where(valid, 1 / tl.sqrt(squares / D + eps), 0.0)[:, None]
        if HALF > 0:
            c_at = batch * stride_cb + token * stride_cs
            s_at = batch * stride_sb + token * stride_ss
            dy1 = _load(dy_ptr, y_at, 0, valid, HALF, HALF_WIDTH)
            dy2 = _load(dy_ptr, y_at, HALF, valid, HALF, HALF_WIDTH)
            g1 = dy1 * _load(cos_ptr, c_at, 0, valid, HALF, HALF_WIDTH)
            g1 += dy2 * _load(sin_ptr, s_at, HALF, valid, HALF, HALF_WIDTH)
            g2 = dy2 * _load(cos_ptr, c_at, HALF, valid, HALF, HALF_WIDTH)
            g2 -= dy1 * _load(sin_ptr, s_at, 0, valid, HALF, HALF_WIDTH)
            h1 *= scale
            h2 *= scale
            if NEED_WEIGHT:
                dw1 += g1 * h1
                dw2 += g2 * h2
            if WEIGHTED:
                g1 *= _load_columns(weight_ptr, 0, HALF, HALF_WIDTH)
                g2 *= _load_columns(weight_ptr, HALF, HALF, HALF_WIDTH)
            product += tl.sum(g1 * h1, axis=1) + tl.sum(g2 * h2, axis=1)
        if REST > 0:
            g3 = _load(dy_ptr, y_at, 2 * HALF, valid, REST, REST_WIDTH)
            h3 *= scale
            if NEED_WEIGHT:
                dw3 += g3 * h3
            if WEIGHTED:
                g3 *= _load_columns(weight_ptr, 2 * HALF, REST, REST_WIDTH)
            product += tl.sum(g3 * h3, axis=1)
        if NEED_X:
            mean = (product / D)[:, None]
            if HALF > 0:
                _store(dx_ptr, to, 0, valid, scale * (g1 - h1 * mean), HALF, HALF_WIDTH)
                _store(dx_ptr, to, HALF, valid, scale * (g2 - h2 * mean), HALF, HALF_WIDTH)
            if REST > 0:
                _store(dx_ptr, to, 2 * HALF, valid, scale * (g3 - h3 * mean), REST, REST_WIDTH)
    if NEED_WEIGHT:
        at = program * D + tl.zeros((1,), tl.int64)
        all_valid = tl.full((1,), 1, tl.int1)
        if HALF > 0:
            _store(d_weight_ptr, at, 0, all_valid, tl.sum(dw1, axis=0)[None, :], HALF, HALF_WIDTH)
            _store(d_weight_ptr, at, HALF, all_valid, tl.sum(dw2, axis=0)[None, :], HALF, HALF_WIDTH)
        if REST > 0:
            _store(d_weight_ptr, at, 2 * HALF, all_valid, tl.sum(dw3, axis=0)[None, :], REST, REST_WIDTH)
