"""Triton kernel: the gradient of the logits of whole rows, with their statistics, from products in memory.

A program reads a token's row twice: once for the log-sum-exp, taken online for each column of a block as in Milakov &
Gimelshein, *Online normalizer calculation for softmax* (2018), and once for the gradient, which may be written over
what has been read.
"""

import triton
import triton.language as tl

from .kernels import capped


@triton.jit
def _row_logits(x_ptr, bias_ptr, word, in_words, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits of some words, float32, and their derivative by the products."""
    x = tl.load(x_ptr + word, mask=in_words, other=0.0)
    if BIAS:
        x += tl.load(bias_ptr + word, mask=in_words, other=0.0).to(tl.float32)
    return capped(x, scale, softcap, SOFTCAP)


@triton.jit
def logits_gradient_kernel(
    x_ptr,
    d_ptr,
    bias_ptr,
    labels_ptr,
    class_weight_ptr,
    slope_ptr,
    own_ptr,
    smooth_ptr,
    square_ptr,
    lse_ptr,
    label_logit_ptr,
    sums_ptr,
    entropy_ptr,
    words,
    x_stride,
    d_stride,
    scale,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SUMS: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
    SQUARE: tl.constexpr,
    ENTROPIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of each row of products ``x`` ``[T, words]``, float32: log-sum-exp, label's logit, weighted sum and entropy of
    the logits, and the gradient by ``x``. It may be in the row's place, its elements of two bytes or of four."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    x_ptr += row * x_stride
    d_ptr += row * d_stride
    column = tl.arange(0, BLOCK_N)
    if label < 0:
        tl.store(lse_ptr + row, 0.0)
        tl.store(label_logit_ptr + row, 0.0)
        if SUMS:
            tl.store(sums_ptr + row, 0.0)
        if ENTROPIES:
            tl.store(entropy_ptr + row, 0.0)
        zeros = tl.zeros((BLOCK_N,), d_ptr.dtype.element_ty)
        for start in range(0, words, BLOCK_N):
            tl.store(d_ptr + start + column, zeros, mask=start + column < words)
        return
    # Finite, also where a bias of -inf leaves all words of a column out.
    peak = tl.full((BLOCK_N,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, words, BLOCK_N):
        word = start + column
        in_words = word < words
        x, _ = _row_logits(x_ptr, bias_ptr, word, in_words, scale, softcap, BIAS, SOFTCAP)
        if SUMS:
            share = tl.where(in_words, x, 0.0)
            if CLASS_WEIGHT:
                share *= tl.load(class_weight_ptr + word, mask=in_words, other=0.0).to(tl.float32)
            sums += share
        x = tl.where(in_words, x, float("-inf"))
        above = tl.maximum(peak, x)
        p = tl.exp(x - above)
        ratio = tl.exp(peak - above)
        total = total * ratio + p
        if ENTROPIES:
            weighted = weighted * ratio + tl.where(p > 0, p * x, 0.0)
        peak = above
    top = tl.max(peak, axis=0)
    shares = tl.exp(peak - top)
    whole = tl.sum(total * shares, axis=0)
    lse = top + tl.log(whole)
    tl.store(lse_ptr + row, lse)
    # A label outside the vocabulary is found nowhere.
    is_inside = label < words
    own_logit, _ = _row_logits(x_ptr, bias_ptr, label, is_inside, scale, softcap, BIAS, SOFTCAP)
    tl.store(label_logit_ptr + row, tl.where(is_inside, own_logit, float("nan")))
    if SUMS:
        tl.store(sums_ptr + row, tl.sum(sums, axis=0))
    if ENTROPIES:
        tl.store(entropy_ptr + row, lse - tl.sum(weighted * shares, axis=0) / whole)
    d_lse = tl.load(slope_ptr + row)
    if SQUARE:
        d_lse += 2 * tl.load(square_ptr + row) * lse
    own = tl.load(own_ptr + row)
    for start in range(0, words, BLOCK_N):
        word = start + column
        in_words = word < words
        x, slope = _row_logits(x_ptr, bias_ptr, word, in_words, scale, softcap, BIAS, SOFTCAP)
        d = tl.exp(x - lse) * d_lse - tl.where(word == label, own, 0.0)
        if SUMS:
            smooth = tl.load(smooth_ptr + row)
            if CLASS_WEIGHT:
                smooth *= tl.load(class_weight_ptr + word, mask=in_words, other=0.0).to(tl.float32)
            d -= smooth
        # What is written here overlaps what the program's other threads have to have read.
        tl.debug_barrier()
        tl.store(d_ptr + word, (d * slope).to(d_ptr.dtype.element_ty), mask=in_words)
