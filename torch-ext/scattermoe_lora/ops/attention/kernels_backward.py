"""Triton kernels: the attention backward, in passes that never write to the same place (Dao, 2023, algorithm 2).

The gradients of keys and values are summed by the program that holds the keys, over the query heads that share them;
that of the queries is summed by another, which computes the scores once more. Nothing is added atomically.
"""

import triton
import triton.language as tl

from .kernels import capped, dot_rows, head_of, rows_of, sees, sequence, spans, store_rows


@triton.jit
def attention_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    q_columns_ptr,
    grad_out_columns_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    queries,
    keys,
    tiles,
    kv_heads,
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
    stride_gb,
    stride_lb,
    stride_lh,
    scale,
    softcap,
    left,
    right,
    VARLEN: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
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
    PASSES: tl.constexpr = 1,
    TMA: tl.constexpr = 0,
):
    """A tile of one key head's keys against all the queries that see them, of every query head that reads it.

    The head's columns are summed by as many programs as there are ``PASSES``, each of which computes the scores.

    With ``TMA`` ``q_ptr``, ``k_ptr``, ``v_ptr`` and ``grad_out_ptr`` are tensor descriptors, and
    ``q_columns_ptr`` and ``grad_out_columns_ptr`` those whose boxes have a pass's columns, if these are no chunk.
    """
    COLUMNS: tl.constexpr = WIDTH // PASSES
    # The tiles of the scores are those of the sums.
    WHOLE: tl.constexpr = CHUNK == WIDTH and PASSES == 1
    # Programs that read the same rows stand side by side.
    d0 = tl.program_id(0) % PASSES * COLUMNS
    pid = tl.program_id(0) // PASSES
    kv_head = (pid // tiles % kv_heads).to(tl.int64)
    batch = (pid // tiles // kv_heads).to(tl.int64)
    q_start, queries = sequence(cu_seqlens_q_ptr, batch, queries, VARLEN)
    k_start, keys = sequence(cu_seqlens_k_ptr, batch, keys, VARLEN)
    first = pid % tiles * BLOCK_N
    if first >= keys:
        return
    k_rows = head_of(k_ptr, batch, kv_head, k_start, stride_kb, stride_ks, stride_kh, 8, VARLEN, TMA)
    v_rows = head_of(v_ptr, batch, kv_head, k_start, stride_vb, stride_vs, stride_vh, 8, VARLEN, TMA)
    key = first + tl.arange(0, BLOCK_N)
    dk = tl.zeros((BLOCK_N, COLUMNS), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, COLUMNS), dtype=tl.float32)
    k = 0.0
    v = 0.0
    if CHUNK == WIDTH:
        k = rows_of(k_rows, first, keys, 0, HEAD_DIM, BLOCK_N, WIDTH, True, VARLEN, TMA)
        if SAME_KV:
            v = k
        else:
            if WANT_K:
                v = rows_of(v_rows, first, keys, 0, HEAD_DIM, BLOCK_N, WIDTH, True, VARLEN, TMA)

    last = min(first + BLOCK_N, keys)
    # The window seen from the keys: what was left of a query is to the right of a key.
    begin, lead, full, blocks = spans(first, last, keys, queries, right, left, RIGHT, LEFT, BLOCK_M, ONE_LOOP)
    for g in range(group):
        head = kv_head * group + g
        stride_dos = kv_heads * group * HEAD_DIM
        # fmt: off
        q_rows = head_of(q_ptr, batch, head, q_start, stride_qb, stride_qs, stride_qh, 8, VARLEN, TMA)
        do_rows = head_of(grad_out_ptr, batch, head, q_start, stride_ob, stride_dos, HEAD_DIM, 1, VARLEN, TMA)
        q_columns_rows, do_columns_rows = q_rows, do_rows
        if TMA and COLUMNS != CHUNK:
            q_columns_rows = head_of(
                q_columns_ptr, batch, head, q_start, stride_qb, stride_qs, stride_qh, 8, VARLEN, TMA
            )
            do_columns_rows = head_of(
                grad_out_columns_ptr, batch, head, q_start, stride_ob, stride_dos, HEAD_DIM, 1, VARLEN, TMA
            )
        # fmt: on
        lse_base = lse_ptr + batch * stride_lb + head * stride_lh + q_start
        delta_base = delta_ptr + batch * stride_lb + head * stride_lh + q_start
        for MASK in tl.static_range(ONE_LOOP, 2):
            for i in range(0 if MASK else lead, lead + blocks - full if MASK else full):
                block = tl.where(i < lead, i, i - lead + full) if MASK else i
                query0 = begin + block * BLOCK_M
                query = query0 + tl.arange(0, BLOCK_M)
                if CHUNK == WIDTH:
                    q = rows_of(q_rows, query0, queries, 0, HEAD_DIM, BLOCK_M, WIDTH, MASK, VARLEN, TMA)
                    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                else:
                    # fmt: off
                    s = dot_rows(
                        k_rows, first, keys, q_rows, query0, queries,
                        HEAD_DIM, BLOCK_N, BLOCK_M, CHUNK, PRECISION, MASK, VARLEN, TMA,
                    )
                    # fmt: on
                s, slope = capped(s, scale, softcap, SOFTCAP)
                lse = tl.load(lse_base + query, mask=query < queries, other=0.0) * 1.4426950408889634
                p = tl.exp2(s - lse[None, :])
                if MASK:
                    visible = sees(query[None, :], key[:, None], queries, keys, left, right, LEFT, RIGHT)
                    p = tl.where(visible, p, 0.0)
                if CHUNK == WIDTH:
                    do = rows_of(do_rows, query0, queries, 0, HEAD_DIM, BLOCK_M, WIDTH, MASK, VARLEN, TMA)
                if WANT_V:
                    do_columns = (
                        do
                        if WHOLE
                        else rows_of(
                            do_columns_rows,
                            query0,
                            queries,
                            d0,
                            HEAD_DIM,
                            BLOCK_M,
                            COLUMNS,
                            MASK,
                            VARLEN,
                            TMA,
                        )
                    )
                    if SAME_KV:
                        dk = tl.dot(p.to(do_columns.dtype), do_columns, dk, input_precision=PRECISION)
                    else:
                        dv = tl.dot(p.to(do_columns.dtype), do_columns, dv, input_precision=PRECISION)
                if WANT_K:
                    if CHUNK == WIDTH:
                        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                    else:
                        # fmt: off
                        dp = dot_rows(
                            v_rows, first, keys, do_rows, query0, queries,
                            HEAD_DIM, BLOCK_N, BLOCK_M, CHUNK, PRECISION, MASK, VARLEN, TMA,
                        )
                        # fmt: on
                    q_columns = (
                        q
                        if WHOLE
                        else rows_of(
                            q_columns_rows, query0, queries, d0, HEAD_DIM, BLOCK_M, COLUMNS, MASK, VARLEN, TMA
                        )
                    )
                    delta = tl.load(delta_base + query, mask=query < queries, other=0.0)
                    ds = p * (dp - delta[None, :]) * (slope * scale)
                    dk = tl.dot(ds.to(q_columns.dtype), q_columns, dk, input_precision=PRECISION)

    at = batch * stride_gb + (k_start.to(tl.int64) * kv_heads + kv_head) * HEAD_DIM
    if WANT_K:
        store_rows(dk_ptr + at, key, kv_heads * HEAD_DIM, keys, dk, d0, HEAD_DIM, COLUMNS)
    if WANT_V and not SAME_KV:
        store_rows(dv_ptr + at, key, kv_heads * HEAD_DIM, keys, dv, d0, HEAD_DIM, COLUMNS)


@triton.jit
def attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    k_columns_ptr,
    out_ptr,
    grad_lse_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    DELTA: tl.constexpr = 0,
    TMA: tl.constexpr = 0,
):
    """A tile of one head's queries against all the keys that they see.

    With ``DELTA`` it also computes what ``attention_delta_kernel`` else has computed before; ``out_ptr`` and
    ``grad_lse_ptr`` are read for that alone, and the second may be None.

    With ``TMA`` ``q_ptr``, ``k_ptr``, ``v_ptr`` and ``grad_out_ptr`` are tensor descriptors, and
    ``k_columns_ptr`` one whose boxes have all columns, if these are no chunk.
    """
    pid = tl.program_id(0)
    head = (pid // tiles % heads).to(tl.int64)
    batch = (pid // tiles // heads).to(tl.int64)
    q_start, queries = sequence(cu_seqlens_q_ptr, batch, queries, VARLEN)
    k_start, keys = sequence(cu_seqlens_k_ptr, batch, keys, VARLEN)
    first = (tiles - 1 - pid % tiles) * BLOCK_M
    if first >= queries:
        return
    stride_dos = heads * HEAD_DIM
    at = batch * stride_ob + (q_start.to(tl.int64) * heads + head) * HEAD_DIM
    # fmt: off
    q_rows = head_of(q_ptr, batch, head, q_start, stride_qb, stride_qs, stride_qh, 8, VARLEN, TMA)
    do_rows = head_of(grad_out_ptr, batch, head, q_start, stride_ob, stride_dos, HEAD_DIM, 1, VARLEN, TMA)
    k_rows = head_of(k_ptr, batch, head // group, k_start, stride_kb, stride_ks, stride_kh, 8, VARLEN, TMA)
    v_rows = head_of(v_ptr, batch, head // group, k_start, stride_vb, stride_vs, stride_vh, 8, VARLEN, TMA)
    k_columns_rows = k_rows
    if TMA and CHUNK != WIDTH:
        k_columns_rows = head_of(
            k_columns_ptr, batch, head // group, k_start, stride_kb, stride_ks, stride_kh, 8, VARLEN, TMA
        )
    # fmt: on
    query = first + tl.arange(0, BLOCK_M)
    at_row = batch * stride_lb + head * stride_lh + q_start + query
    lse = tl.load(lse_ptr + at_row, mask=query < queries, other=0.0) * 1.4426950408889634
    dq = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    q = 0.0
    do = 0.0
    if CHUNK == WIDTH:
        q = rows_of(q_rows, first, queries, 0, HEAD_DIM, BLOCK_M, WIDTH, True, VARLEN, TMA)
        do = rows_of(do_rows, first, queries, 0, HEAD_DIM, BLOCK_M, WIDTH, True, VARLEN, TMA)
    if DELTA:
        delta = tl.zeros((BLOCK_M,), tl.float32)
        # A few columns at a time, whatever is read again: here no register is worth a product's.
        # Boxes have a chunk's.
        COLUMNS: tl.constexpr = 64 if CHUNK > 64 and not TMA else CHUNK
        for d0 in range(0, HEAD_DIM, COLUMNS):
            do_columns = rows_of(do_rows, first, queries, d0, HEAD_DIM, BLOCK_M, COLUMNS, True, VARLEN, TMA)
            o = rows_of(
                (out_ptr + at, stride_dos), first, queries, d0, HEAD_DIM, BLOCK_M, COLUMNS, True, False, False
            )
            delta += tl.sum(do_columns.to(tl.float32) * o.to(tl.float32), axis=1)
        if grad_lse_ptr is not None:
            delta -= tl.load(grad_lse_ptr + at_row, mask=query < queries, other=0.0)
        tl.store(delta_ptr + at_row, delta, mask=query < queries)
    else:
        delta = tl.load(delta_ptr + at_row, mask=query < queries, other=0.0)

    last = min(first + BLOCK_M, queries)
    begin, lead, full, blocks = spans(first, last, queries, keys, left, right, LEFT, RIGHT, BLOCK_N, ONE_LOOP)
    for MASK in tl.static_range(ONE_LOOP, 2):
        for i in range(0 if MASK else lead, lead + blocks - full if MASK else full):
            block = tl.where(i < lead, i, i - lead + full) if MASK else i
            key0 = begin + block * BLOCK_N
            key = key0 + tl.arange(0, BLOCK_N)
            if CHUNK == WIDTH:
                k = rows_of(k_rows, key0, keys, 0, HEAD_DIM, BLOCK_N, WIDTH, MASK, VARLEN, TMA)
                v = (
                    k
                    if SAME_KV
                    else rows_of(v_rows, key0, keys, 0, HEAD_DIM, BLOCK_N, WIDTH, MASK, VARLEN, TMA)
                )
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            else:
                # fmt: off
                s = dot_rows(
                    q_rows, first, queries, k_rows, key0, keys,
                    HEAD_DIM, BLOCK_M, BLOCK_N, CHUNK, PRECISION, MASK, VARLEN, TMA,
                )
                dp = dot_rows(
                    do_rows, first, queries, v_rows, key0, keys,
                    HEAD_DIM, BLOCK_M, BLOCK_N, CHUNK, PRECISION, MASK, VARLEN, TMA,
                )
                # fmt: on
                k = rows_of(k_columns_rows, key0, keys, 0, HEAD_DIM, BLOCK_N, WIDTH, MASK, VARLEN, TMA)
            s, slope = capped(s, scale, softcap, SOFTCAP)
            p = tl.exp2(s - lse[:, None])
            if MASK:
                visible = sees(query[:, None], key[None, :], queries, keys, left, right, LEFT, RIGHT)
                p = tl.where(visible, p, 0.0)
            ds = p * (dp - delta[:, None]) * (slope * scale)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dq_ptr + at, query, heads * HEAD_DIM, queries, dq, 0, HEAD_DIM, WIDTH)
