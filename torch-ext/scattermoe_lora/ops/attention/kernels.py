"""Triton kernels: the attention forward, and what forward and backward share.

The algorithm is FlashAttention 2's (Dao, 2023). A head of 512 is twice what it was made for: there the scores are
summed over ``CHUNK`` columns of the head at a time, so that only one operand of the second product has to fit shared
memory as a whole. With ``CHUNK == WIDTH`` the tile of the program's own rows stays on the chip.

Strides of q, k and v count 8 elements, as the launcher does: at any head size the compiler then sees that a row starts
at a multiple of 16 bytes. All else is contiguous.
"""

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged


@triton.jit
def sequence(cu_seqlens_ptr, batch, length, VARLEN: tl.constexpr):
    """``(start, length)`` of one sequence in the tensor's rows."""
    start = length * 0
    if VARLEN:
        start = tl.load(cu_seqlens_ptr + batch)
        length = tl.load(cu_seqlens_ptr + batch + 1) - start
    return start, length


@triton.jit
def spans(
    first,
    last,
    own,
    other,
    left,
    right,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_LOOP: tl.constexpr,
):
    """Blocks of the other side that rows ``[first, last)`` of one side meet: ``(begin, lead, full, blocks)``.

    Row i meets the others from ``i + other - own - left`` to ``i + other - own + right``. The blocks start at
    ``begin``; those before ``lead`` and from ``full`` on are cut by the window or by the end of the sequence, and need
    a mask. With ``ONE_LOOP`` all count as such: one loop goes through them, whose code needs registers once.
    """
    shift = other - own
    begin = shift * 0
    end = other
    whole = other
    if LEFT:
        begin = max(begin, first + shift - left)
    if RIGHT:
        end = min(end, last + shift + right)
        whole = min(whole, first + shift + right + 1)
    blocks = (max(end - begin, 0) + BLOCK - 1) // BLOCK
    full = min(max(whole - begin, 0) // BLOCK, blocks)
    lead = begin * 0
    if LEFT:
        lead = min((max(last - 1 + shift - left - begin, 0) + BLOCK - 1) // BLOCK, blocks)
        full = max(full, lead)
    if ONE_LOOP:
        full = lead
    return begin, lead, full, blocks


@triton.jit
def head_of(
    source,
    batch,
    head,
    start,
    stride_b,
    stride_s,
    stride_h,
    UNIT: tl.constexpr,
    VARLEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """The place of one head's rows of a sequence, as ``rows_of`` takes it.

    Args:
        source: A pointer, or with ``TMA`` a descriptor of :func:`.descriptors.describe`.
        batch, head, start: Where the rows begin.
        stride_b, stride_s, stride_h: Of batch, rows and heads, in units of so many elements.
    """
    if TMA:
        return source, head.to(tl.int32), start if VARLEN else batch.to(tl.int32)
    else:
        return source + UNIT * (
            batch * stride_b + start.to(tl.int64) * stride_s + head * stride_h
        ), stride_s * UNIT


@triton.jit
def rows_of(
    place,
    first,
    rows,
    d0,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK: tl.constexpr,
    VARLEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """``[ROWS, COLUMNS]`` from row ``first`` and column ``d0`` on; zeros past the head, and past the last row.

    Without ``MASK`` and ``TMA`` there is none past the last row.
    """
    if TMA:
        if VARLEN:
            box = load_ragged(place[0], place[2], rows, [place[1], first, d0], 1)
        else:
            box = place[0].load([place[2], place[1], first, d0])
        return box.reshape(ROWS, COLUMNS)
    else:
        row = first + tl.arange(0, ROWS)
        d = d0 + tl.arange(0, COLUMNS)
        # 64-bit: a matrix of rows passes 2^31 elements.
        at = place[0] + row[:, None].to(tl.int64) * place[1] + d[None, :]
        if HEAD_DIM % COLUMNS == 0:
            if MASK:
                return tl.load(at, mask=(row < rows)[:, None], other=0.0)
            else:
                return tl.load(at)
        else:
            if MASK:
                return tl.load(at, mask=(row < rows)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
            else:
                return tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, row, stride, rows, value, d0, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    d = d0 + tl.arange(0, COLUMNS)
    at = ptr + row[:, None].to(tl.int64) * stride + d[None, :]
    mask = (row < rows)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot_rows(
    a,
    a_first,
    a_rows,
    b,
    b_first,
    b_rows,
    HEAD_DIM: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,
    VARLEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """``a b^T`` of two tiles of rows, read a chunk of columns at a time; ``a`` may always pass its last row."""
    acc = tl.zeros((A_ROWS, B_ROWS), dtype=tl.float32)
    for d0 in range(0, HEAD_DIM, CHUNK):
        a_chunk = rows_of(a, a_first, a_rows, d0, HEAD_DIM, A_ROWS, CHUNK, True, VARLEN, TMA)
        b_chunk = rows_of(b, b_first, b_rows, d0, HEAD_DIM, B_ROWS, CHUNK, MASK, VARLEN, TMA)
        acc = tl.dot(a_chunk, tl.trans(b_chunk), acc, input_precision=PRECISION)
    return acc


@triton.jit
def capped(s, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log 2, and the soft cap's derivative by ``s * scale`` (1 where there is none)."""
    if SOFTCAP:
        tanh = 2 * tl.sigmoid(2 * s * (scale / softcap)) - 1
        return tanh * (softcap * 1.4426950408889634), 1 - tanh * tanh
    else:
        return s * (scale * 1.4426950408889634), tl.full((1, 1), 1.0, tl.float32)


@triton.jit
def sees(query, key, queries, keys, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """True where a query sees a key, for two index tensors that broadcast."""
    distance = key - query - (keys - queries)
    visible = (key < keys) & (query < queries)
    if LEFT:
        visible = visible & (distance >= -left)
    if RIGHT:
        visible = visible & (distance <= right)
    return visible


@triton.jit
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    queries,
    keys,
    tiles,
    heads,
    group,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ob,
    stride_lb,
    stride_lh,
    scale,
    softcap,
    left,
    right,
    VARLEN: tl.constexpr,
    SAME_KV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_LOOP: tl.constexpr = 0,
    TMA: tl.constexpr = 0,
):
    """A tile of one head's queries against all the keys that they see.

    With ``TMA`` ``q_ptr``, ``k_ptr`` and ``v_ptr`` are tensor descriptors.
    """
    pid = tl.program_id(0)
    head = (pid // tiles % heads).to(tl.int64)
    batch = (pid // tiles // heads).to(tl.int64)
    q_start, queries = sequence(cu_seqlens_q_ptr, batch, queries, VARLEN)
    k_start, keys = sequence(cu_seqlens_k_ptr, batch, keys, VARLEN)
    # The last tiles first: under a causal mask they see most keys, and nobody should wait for them at the end.
    first = (tiles - 1 - pid % tiles) * BLOCK_M
    if first >= queries:
        return
    q_rows = head_of(q_ptr, batch, head, q_start, stride_qb, stride_qs, stride_qh, 8, VARLEN, TMA)
    k_rows = head_of(k_ptr, batch, head // group, k_start, stride_kb, stride_ks, stride_kh, 8, VARLEN, TMA)
    v_rows = head_of(v_ptr, batch, head // group, k_start, stride_vb, stride_vs, stride_vh, 8, VARLEN, TMA)
    query = first + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    q = 0.0
    if CHUNK == WIDTH:
        q = rows_of(q_rows, first, queries, 0, HEAD_DIM, BLOCK_M, WIDTH, True, VARLEN, TMA)

    last = min(first + BLOCK_M, queries)
    begin, lead, full, blocks = spans(first, last, queries, keys, left, right, LEFT, RIGHT, BLOCK_N, ONE_LOOP)
    # First the blocks that every query sees as a whole, then those that need a mask.
    for MASK in tl.static_range(ONE_LOOP, 2):
        for i in range(0 if MASK else lead, lead + blocks - full if MASK else full):
            block = tl.where(i < lead, i, i - lead + full) if MASK else i
            key0 = begin + block * BLOCK_N
            key = key0 + tl.arange(0, BLOCK_N)
            if CHUNK == WIDTH:
                k = rows_of(k_rows, key0, keys, 0, HEAD_DIM, BLOCK_N, WIDTH, MASK, VARLEN, TMA)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            else:
                # fmt: off
                s = dot_rows(
                    q_rows, first, queries, k_rows, key0, keys,
                    HEAD_DIM, BLOCK_M, BLOCK_N, CHUNK, PRECISION, MASK, VARLEN, TMA,
                )
                # fmt: on
            s, _ = capped(s, scale, softcap, SOFTCAP)
            if MASK:
                visible = sees(query[:, None], key[None, :], queries, keys, left, right, LEFT, RIGHT)
                s = tl.where(visible, s, float("-inf"))
            highest = tl.maximum(top, tl.max(s, axis=1))
            # A row that has seen nothing yet would subtract -inf from -inf.
            base = tl.where(highest == float("-inf"), 0.0, highest) if MASK else highest
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
            top = highest
            total = total * shrink + tl.sum(p, axis=1)
            v = (
                k
                if SAME_KV and CHUNK == WIDTH
                else rows_of(v_rows, key0, keys, 0, HEAD_DIM, BLOCK_N, WIDTH, MASK, VARLEN, TMA)
            )
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)

    total = tl.where(total == 0, 1.0, total)
    out_base = out_ptr + batch * stride_ob + (q_start.to(tl.int64) * heads + head) * HEAD_DIM
    store_rows(out_base, query, heads * HEAD_DIM, queries, acc / total[:, None], 0, HEAD_DIM, WIDTH)
    lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + batch * stride_lb + head * stride_lh + q_start + query, lse, mask=query < queries)


@triton.jit
def attention_delta_kernel(
    grad_out_ptr,
    out_ptr,
    grad_lse_ptr,
    delta_ptr,
    rows,
    heads,
    tiles,
    GRAD_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``delta[b, h, s] = <grad_out, out> - grad_lse``, of ``[B, S, H, D]`` and ``[B, H, S]``."""
    pid = tl.program_id(0)
    head = (pid // tiles % heads).to(tl.int64)
    batch = (pid // tiles // heads).to(tl.int64)
    first = pid % tiles * BLOCK
    at = (batch * rows * heads + head) * HEAD_DIM
    stride = heads * HEAD_DIM
    do = rows_of((grad_out_ptr + at, stride), first, rows, 0, HEAD_DIM, BLOCK, WIDTH, True, False, False)
    o = rows_of((out_ptr + at, stride), first, rows, 0, HEAD_DIM, BLOCK, WIDTH, True, False, False)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    row = first + tl.arange(0, BLOCK)
    at = (batch * heads + head) * rows + row
    if GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + at, mask=row < rows, other=0.0)
    tl.store(delta_ptr + at, delta, mask=row < rows)
