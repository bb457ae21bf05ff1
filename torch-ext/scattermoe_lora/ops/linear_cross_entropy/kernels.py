"""Triton kernels: statistics of a tile of logits, and their gradient for a part of the vocabulary.

A program multiplies one tile of tokens and words, as a matrix product does, and sums up what it needs over the tile's
words while the logits are in registers: they are never written. The sums of a token's tiles are put together later, as
in Milakov & Gimelshein, *Online normalizer calculation for softmax* (2018). Nothing is added atomically.
"""

import triton
import triton.language as tl


@triton.jit
def _place(tokens, words, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``(tile of words, token, in_tokens, word, in_words)``; ``GROUP_M`` tiles of tokens share a tile of words."""
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(words, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    size = min(tiles_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    tile_n = within // size
    token = (group * GROUP_M + within % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    word = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return tile_n, token, token < tokens, word, word < words


@triton.jit
def capped(x, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits of products ``x``, float32, and their derivative by these."""
    if SOFTCAP:
        tanh = 2 * tl.sigmoid(2 * x * (scale / softcap)) - 1
        logits = tanh * softcap
        slope = (1 - tanh * tanh) * scale
    else:
        logits = x * scale
        slope = scale
    return logits, slope


@triton.jit
def _logits(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    low_ptr,
    b_ptr,
    token,
    in_tokens,
    word,
    in_words,
    H,
    R,
    scale,
    softcap,
    BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Logits of a tile, float32, and their derivative by the product."""
    x = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    k = tl.arange(0, BLOCK_K)
    # 64-bit from here on: the head of a large vocabulary passes 2^31 elements.
    rows, columns = token.to(tl.int64), word.to(tl.int64)
    h_tile = hidden_ptr + rows[:, None] * H + k[None, :]
    w_tile = weight_ptr + columns[None, :] * H + k[:, None]
    for k0 in range(0, H, BLOCK_K):
        if EVEN_K:
            h = tl.load(h_tile, mask=in_tokens[:, None], other=0.0)
            w = tl.load(w_tile, mask=in_words[None, :], other=0.0)
        else:
            in_k = k0 + k < H
            h = tl.load(h_tile, mask=in_tokens[:, None] & in_k[None, :], other=0.0)
            w = tl.load(w_tile, mask=in_k[:, None] & in_words[None, :], other=0.0)
        x = tl.dot(h, w.to(h.dtype), x, input_precision=PRECISION)
        h_tile += BLOCK_K
        w_tile += BLOCK_K
    if LOW_RANK:
        r = tl.arange(0, BLOCK_R)
        for r0 in range(0, R, BLOCK_R):
            in_r = r0 + r < R
            low = tl.load(
                low_ptr + rows[:, None] * R + (r0 + r)[None, :],
                mask=in_tokens[:, None] & in_r[None, :],
                other=0.0,
            )
            b = tl.load(
                b_ptr + columns[None, :] * R + (r0 + r)[:, None],
                mask=in_r[:, None] & in_words[None, :],
                other=0.0,
            )
            x = tl.dot(low, b, x, input_precision=PRECISION)
    if BIAS:
        x += tl.load(bias_ptr + word, mask=in_words, other=0.0).to(tl.float32)[None, :]
    return capped(x, scale, softcap, SOFTCAP)


@triton.jit
def logits_forward_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    low_ptr,
    b_ptr,
    labels_ptr,
    class_weight_ptr,
    lse_ptr,
    label_logit_ptr,
    sums_ptr,
    mean_ptr,
    peak_ptr,
    tokens,
    words,
    H,
    R,
    scale,
    softcap,
    BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SUMS: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
    ENTROPIES: tl.constexpr,
    PEAKS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Of each token and tile of words, ``[tiles, T]``: log-sum-exp, weighted sum, mean and maximum of logits. And
    ``[T]``, the label's logit. Tokens with a negative label are left out."""
    tile_n, token, in_tokens, word, in_words = _place(tokens, words, GROUP_M, BLOCK_M, BLOCK_N)
    label = tl.load(labels_ptr + token, mask=in_tokens, other=-1)
    if tl.max(label, axis=0) < 0:
        return
    # fmt: off
    x, _ = _logits(
        hidden_ptr, weight_ptr, bias_ptr, low_ptr, b_ptr, token, in_tokens, word, in_words, H, R, scale, softcap,
        BIAS, LOW_RANK, SOFTCAP, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
    )
    # fmt: on
    at = tile_n.to(tl.int64) * tokens + token
    is_label = label[:, None] == word[None, :]
    label_logit = tl.sum(tl.where(is_label, x, 0.0), axis=1)
    is_here = (label >= tile_n * BLOCK_N) & (label < tl.minimum(tile_n * BLOCK_N + BLOCK_N, words))
    tl.store(label_logit_ptr + token, label_logit, mask=in_tokens & is_here)
    if SUMS:
        weighted = tl.where(in_words[None, :], x, 0.0)
        if CLASS_WEIGHT:
            class_weight = tl.load(class_weight_ptr + word, mask=in_words, other=0.0).to(tl.float32)
            weighted *= class_weight[None, :]
        tl.store(sums_ptr + at, tl.sum(weighted, axis=1), mask=in_tokens)
    masked = tl.where(in_words[None, :], x, float("-inf"))
    # Finite, also where a bias of -inf leaves all words of the tile out.
    peak = tl.maximum(tl.max(masked, axis=1), -3.0e38)
    p = tl.exp(masked - peak[:, None])
    total = tl.sum(p, axis=1)
    tl.store(lse_ptr + at, peak + tl.log(total), mask=in_tokens)
    if PEAKS:
        tl.store(peak_ptr + at, peak, mask=in_tokens)
    if ENTROPIES:
        mean = tl.sum(tl.where(p > 0, p * x, 0.0), axis=1) / tl.maximum(total, 1.0e-30)
        tl.store(mean_ptr + at, mean, mask=in_tokens)


@triton.jit
def logits_backward_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    low_ptr,
    b_ptr,
    labels_ptr,
    class_weight_ptr,
    lse_ptr,
    entropy_ptr,
    d_lse_ptr,
    d_label_ptr,
    d_sum_ptr,
    d_entropy_ptr,
    d_ptr,
    tokens,
    words,
    first,
    H,
    R,
    scale,
    softcap,
    BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SUMS: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
    ENTROPIES: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The gradient ``[T, words]`` of what becomes logits, for ``words`` words from ``first`` on.

    Pointers to the head's rows stand at the first of them.
    """
    _, token, in_tokens, word, in_words = _place(tokens, words, GROUP_M, BLOCK_M, BLOCK_N)
    in_tile = in_tokens[:, None] & in_words[None, :]
    d_tile = d_ptr + token.to(tl.int64)[:, None] * words + word[None, :]
    label = tl.load(labels_ptr + token, mask=in_tokens, other=-1)
    if tl.max(label, axis=0) < 0:
        tl.store(d_tile, tl.zeros((BLOCK_M, BLOCK_N), d_ptr.dtype.element_ty), mask=in_tile)
        return
    # fmt: off
    x, slope = _logits(
        hidden_ptr, weight_ptr, bias_ptr, low_ptr, b_ptr, token, in_tokens, word, in_words, H, R, scale, softcap,
        BIAS, LOW_RANK, SOFTCAP, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
    )
    # fmt: on
    is_kept = in_tokens & (label >= 0)
    log_p = x - tl.load(lse_ptr + token, mask=is_kept, other=0.0)[:, None]
    p = tl.exp(log_p)
    d_lse = tl.load(d_lse_ptr + token, mask=is_kept, other=0.0)
    if ENTROPIES:
        entropy = tl.load(entropy_ptr + token, mask=is_kept, other=0.0)
        d_entropy = tl.load(d_entropy_ptr + token, mask=is_kept, other=0.0)
        terms = tl.where(p > 0, log_p + entropy[:, None], 0.0)
        d = p * (d_lse[:, None] - d_entropy[:, None] * terms)
    else:
        d = p * d_lse[:, None]
    d_label = tl.load(d_label_ptr + token, mask=is_kept, other=0.0)
    d += tl.where(label[:, None] == (first + word)[None, :], d_label[:, None], 0.0)
    if SUMS:
        d_sum = tl.load(d_sum_ptr + token, mask=is_kept, other=0.0)
        if CLASS_WEIGHT:
            class_weight = tl.load(class_weight_ptr + word, mask=in_words, other=0.0).to(tl.float32)
            d += d_sum[:, None] * class_weight[None, :]
        else:
            d += d_sum[:, None]
    # Of a token that is left out the log-sum-exp is not known, and p may be infinite.
    d = tl.where(is_kept[:, None], d * slope, 0.0)
    tl.store(d_tile, d.to(d_ptr.dtype.element_ty), mask=in_tile)
