"""Triton kernels: RMSNorm with rotary embedding, one pass over the rows forward and one backward.

A row is one head of one token. It is held as three parts: the two halves of its rotated columns, whose products with
cosine and sine make each other's results, and the rest, which is not rotated. A part may have no columns.

A block is of rows, or of groups of ``INNER`` rows: with all heads of a token in a group, cosine and sine are read once
for all of them. ``PRELOAD`` reads the weight once a program, before the rows, and the angles before the rows that they
turn. ``STAGES`` above 1 has so many rounds of a loop in flight, by asynchronous copies.
"""

import triton
import triton.language as tl


@triton.jit
def _place(block, blocks, groups, HEADS: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """``(batch, token, first head, valid)`` of a block's groups, 64-bit, as what is multiplied by them may pass 2^31.

    ``groups`` is the number of groups of one batch entry, ``blocks`` that of its blocks.
    """
    batch = (block // blocks).to(tl.int64)
    group = (block % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return batch, group // (HEADS // INNER), group % (HEADS // INNER) * INNER, group < groups


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
def _parts(
    ptr,
    at,
    valid,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
):
    """The three parts of rows, float32 ``[BLOCK, WIDTH]``; 0 for a part without columns."""
    first, second, rest = 0.0, 0.0, 0.0
    if HALF > 0:
        first = _load(ptr, at, 0, valid, HALF, HALF_WIDTH)
        second = _load(ptr, at, HALF, valid, HALF, HALF_WIDTH)
    if REST > 0:
        rest = _load(ptr, at, 2 * HALF, valid, REST, REST_WIDTH)
    return first, second, rest


@triton.jit
def _weights(
    ptr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weight's three parts as ``BLOCK`` equal rows: each is read by the threads that hold that row of a block, so
    that none is exchanged between threads. 1 where there is no weight."""
    w1, w2, w3 = 1.0, 1.0, 1.0
    if WEIGHTED:
        at = tl.zeros((BLOCK,), tl.int64)
        valid = tl.full((BLOCK,), 1, tl.int1)
        w1, w2, w3 = _parts(ptr, at, valid, HALF, REST, HALF_WIDTH, REST_WIDTH)
    return w1, w2, w3


@triton.jit
def _weighted(
    value,
    loaded,
    ptr,
    first,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRELOAD: tl.constexpr,
):
    """``value`` times its columns' weights: those that are ``loaded`` already, or ``[1, WIDTH]`` loaded here."""
    if WEIGHTED:
        if PRELOAD:
            value *= loaded
        else:
            column = tl.arange(0, WIDTH)
            weight = tl.load(ptr + first + column, mask=column < LENGTH, other=0.0)
            value *= weight.to(tl.float32)[None, :]
    return value


@triton.jit
def _angles(cos_ptr, sin_ptr, c_at, s_at, valid, HALF: tl.constexpr, HALF_WIDTH: tl.constexpr):
    """Cosines of both halves of the rotated columns, and sines; 0 where none are rotated."""
    c1, c2, s1, s2 = 0.0, 0.0, 0.0, 0.0
    if HALF > 0:
        c1 = _load(cos_ptr, c_at, 0, valid, HALF, HALF_WIDTH)
        s2 = _load(sin_ptr, s_at, HALF, valid, HALF, HALF_WIDTH)
        c2 = _load(cos_ptr, c_at, HALF, valid, HALF, HALF_WIDTH)
        s1 = _load(sin_ptr, s_at, 0, valid, HALF, HALF_WIDTH)
    return c1, c2, s1, s2


@triton.jit
def rotary_forward_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    groups,
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
    INNER: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRELOAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    D: tl.constexpr = 2 * HALF + REST
    batch, token, first_head, valid = _place(tl.program_id(0), blocks, groups, HEADS, INNER, BLOCK)
    c_at = batch * stride_cb + token * stride_cs
    s_at = batch * stride_sb + token * stride_ss
    if PRELOAD:
        w1, w2, w3 = _weights(weight_ptr, HALF, REST, HALF_WIDTH, REST_WIDTH, WEIGHTED, BLOCK)
        c1, c2, s1, s2 = _angles(cos_ptr, sin_ptr, c_at, s_at, valid, HALF, HALF_WIDTH)
    else:
        w1, w2, w3 = 1.0, 1.0, 1.0
    # The norm's result is rounded before it is rotated, and each product before the sum, as in the model's own code.
    inner = x_ptr.dtype.element_ty
    outer = out_ptr.dtype.element_ty
    for i in tl.range(0, INNER, num_stages=STAGES):
        head = first_head + i
        at = batch * stride_xb + token * stride_xs + head * stride_xh
        to = (batch * groups * INNER + token * HEADS + head) * D
        squares = tl.zeros((BLOCK,), tl.float32)
        if HALF > 0:
            x1 = _load(x_ptr, at, 0, valid, HALF, HALF_WIDTH)
            x2 = _load(x_ptr, at, HALF, valid, HALF, HALF_WIDTH)
            squares += tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
        if REST > 0:
            x3 = _load(x_ptr, at, 2 * HALF, valid, REST, REST_WIDTH)
            squares += tl.sum(x3 * x3, axis=1)
        scale = (1 / tl.sqrt(squares / D + eps))[:, None]
        if HALF > 0:
            n1 = _weighted(x1 * scale, w1, weight_ptr, 0, HALF, HALF_WIDTH, WEIGHTED, PRELOAD)
            n2 = _weighted(x2 * scale, w2, weight_ptr, HALF, HALF, HALF_WIDTH, WEIGHTED, PRELOAD)
            n1 = n1.to(inner).to(tl.float32)
            n2 = n2.to(inner).to(tl.float32)
            if not PRELOAD:
                c1, c2, s1, s2 = _angles(cos_ptr, sin_ptr, c_at, s_at, valid, HALF, HALF_WIDTH)
            y1 = (n1 * c1).to(outer).to(tl.float32) - (n2 * s1).to(outer).to(tl.float32)
            y2 = (n2 * c2).to(outer).to(tl.float32) + (n1 * s2).to(outer).to(tl.float32)
            _store(out_ptr, to, 0, valid, y1, HALF, HALF_WIDTH)
            _store(out_ptr, to, HALF, valid, y2, HALF, HALF_WIDTH)
        if REST > 0:
            n3 = _weighted(x3 * scale, w3, weight_ptr, 2 * HALF, REST, REST_WIDTH, WEIGHTED, PRELOAD)
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
    groups,
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
    INNER: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRELOAD: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
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
    if PRELOAD:
        w1, w2, w3 = _weights(weight_ptr, HALF, REST, HALF_WIDTH, REST_WIDTH, WEIGHTED, BLOCK)
    else:
        w1, w2, w3 = 1.0, 1.0, 1.0
    for block in tl.range(program, all_blocks, tl.num_programs(0), num_stages=STAGES):
        # A division of 32 bits, not of the 64 that the loop counts in; the interpreter counts in Python's integers.
        narrow = (block + tl.zeros((), tl.int64)).to(tl.int32)
        batch, token, first_head, valid = _place(narrow, blocks, groups, HEADS, INNER, BLOCK)
        c_at = batch * stride_cb + token * stride_cs
        s_at = batch * stride_sb + token * stride_ss
        if PRELOAD:
            c1, c2, s1, s2 = _angles(cos_ptr, sin_ptr, c_at, s_at, valid, HALF, HALF_WIDTH)
        for i in tl.range(0, INNER, num_stages=STAGES):
            head = first_head + i
            y_at = batch * stride_yb + token * stride_ys + head * stride_yh
            x_at = batch * stride_xb + token * stride_xs + head * stride_xh
            to = (batch * groups * INNER + token * HEADS + head) * D
            squares = tl.zeros((BLOCK,), tl.float32)
            product = tl.zeros((BLOCK,), tl.float32)
            if PRELOAD:
                dy1, dy2, g3 = _parts(dy_ptr, y_at, valid, HALF, REST, HALF_WIDTH, REST_WIDTH)
            h1, h2, h3 = _parts(x_ptr, x_at, valid, HALF, REST, HALF_WIDTH, REST_WIDTH)
            if HALF > 0:
                squares += tl.sum(h1 * h1, axis=1) + tl.sum(h2 * h2, axis=1)
            if REST > 0:
                squares += tl.sum(h3 * h3, axis=1)
            # With eps = 0 a row beyond the last would be 0 / 0, and reach the weight's gradient.
            scale = tl.where(valid, 1 / tl.sqrt(squares / D + eps), 0.0)[:, None]
            if HALF > 0:
                if not PRELOAD:
                    dy1 = _load(dy_ptr, y_at, 0, valid, HALF, HALF_WIDTH)
                    dy2 = _load(dy_ptr, y_at, HALF, valid, HALF, HALF_WIDTH)
                    c1, c2, s1, s2 = _angles(cos_ptr, sin_ptr, c_at, s_at, valid, HALF, HALF_WIDTH)
                g1 = dy1 * c1 + dy2 * s2
                g2 = dy2 * c2 - dy1 * s1
                h1 *= scale
                h2 *= scale
                if NEED_WEIGHT:
                    dw1 += g1 * h1
                    dw2 += g2 * h2
                g1 = _weighted(g1, w1, weight_ptr, 0, HALF, HALF_WIDTH, WEIGHTED, PRELOAD)
                g2 = _weighted(g2, w2, weight_ptr, HALF, HALF, HALF_WIDTH, WEIGHTED, PRELOAD)
                product += tl.sum(g1 * h1, axis=1) + tl.sum(g2 * h2, axis=1)
            if REST > 0:
                if not PRELOAD:
                    g3 = _load(dy_ptr, y_at, 2 * HALF, valid, REST, REST_WIDTH)
                h3 *= scale
                if NEED_WEIGHT:
                    dw3 += g3 * h3
                g3 = _weighted(g3, w3, weight_ptr, 2 * HALF, REST, REST_WIDTH, WEIGHTED, PRELOAD)
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
