"""The public functions: attention with FlashAttention 2's signature and meaning, for head sizes up to 512."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .. import dispatch
from . import eager
from .arguments import Operands, Settings
from .op import forward
from .window import Window

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_HEAD_DIM = 512


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(softmax_scale * q k^T + mask) v`` for a batch of sequences of equal length.

    Signature and meaning are those of FlashAttention 2 (Dao, *FlashAttention-2*, 2023), for head sizes up to 512.
    Memory grows with the length, not its square. Differentiable in ``q``, ``k`` and ``v``, always deterministic. Where
    ``v is k``, it is read once.

    Args:
        q: ``[B, Sq, Hq, D]``, D up to 512 (padded where it is no multiple of 8 or less than 16); float64 (CPU alone),
            float32, bfloat16 or float16, summed in float32.
        k, v: ``[B, Sk, Hkv, D]``, dtype and device of ``q``; Hkv divides Hq, and query head h reads key head
            ``h // (Hq / Hkv)``.
        dropout_p: Must be 0.
        softmax_scale: Factor of the scores; None: ``D ** -0.5``.
        causal: Query i sees the keys up to ``i + Sk - Sq``: the last query sees all.
        window_size: ``(left, right)``, or a tensor of both: query i sees keys ``i + Sk - Sq - left`` to
            ``i + Sk - Sq + right``, both included; -1: no bound. ``causal`` makes ``right`` 0.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: they stay.
        alibi_slopes: Must be None.
        deterministic: Taken for the signature's sake: the gradients always are, on a CPU for one number of threads.
        return_attn_probs: Must be False; the probabilities are never in memory.
        s_aux: Attention sinks ``[Hq]``, any floating dtype, differentiable: a key of that score and no value.

    Returns:
        ``[B, Sq, Hq, D]``, dtype of ``q``. A query that sees no key gets zeros.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit together; the message names argument, expected and got.
        NotImplementedError: Dropout, ALiBi, returned probabilities; forward-mode differentiation, ``torch.func.grad``
            and second derivatives.
    """
    name = "flash_attn_func"
    _refuse(name, dropout_p, alibi_slopes, return_attn_probs)
    _check(name, q, k, v, "[B, S, H, D]")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"{name}: k: expected {q.shape[0]} sequences (as q), got {k.shape[0]}")
    return _attend(
        name, q, k, v, None, None, q.shape[1], k.shape[1], softmax_scale, causal, window_size, softcap, s_aux
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`flash_attn_func` for sequences of any lengths, one behind the other.

    Args:
        q: ``[Tq, Hq, D]``, all sequences' queries.
        k, v: ``[Tk, Hkv, D]``.
        cu_seqlens_q, cu_seqlens_k: ``[B + 1]`` int32 or int64 on the device of ``q``: sequence b is rows
            ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. They start at 0, do not decrease and end at Tq and Tk, which is
            checked on a CPU; on a GPU the check would have to wait for the device, and is left out.
        max_seqlen_q, max_seqlen_k: The longest sequence's length, or more. Too small a number is refused on a CPU and
            leaves rows out on a GPU.
        block_table: Must be None; there is no paged cache.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, s_aux:
            As in :func:`flash_attn_func`, with the lengths of each sequence.

    Returns:
        ``[Tq, Hq, D]``, dtype of ``q``.

    Raises:
        ValueError: As in :func:`flash_attn_func`, and ``cu_seqlens`` that are not as above.
        NotImplementedError: As there, and ``block_table``.
    """
    name = "flash_attn_varlen_func"
    _refuse(name, dropout_p, alibi_slopes, return_attn_probs)
    if block_table is not None:
        raise NotImplementedError(f"{name}: block_table: paged caches are not supported; pass None")
    _check(name, q, k, v, "[T, H, D]")
    for argument, boundaries in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if boundaries.dim() != 1 or boundaries.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name}: {argument}: expected [B + 1] of int32 or int64, got {list(boundaries.shape)} of "
                f"{boundaries.dtype}"
            )
        if boundaries.device != q.device:
            raise ValueError(f"{name}: {argument}: expected device of q, {q.device}, got {boundaries.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.shape[0] < 2:
        raise ValueError(
            f"{name}: cu_seqlens_q and cu_seqlens_k: expected one shape [B + 1] with B >= 1, got "
            f"{list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}"
        )
    return _attend(
        name,
        q,
        k,
        v,
        # The kernels read them one behind the other.
        cu_seqlens_q.to(torch.int32).contiguous(),
        cu_seqlens_k.to(torch.int32).contiguous(),
        int(max_seqlen_q),
        int(max_seqlen_k),
        softmax_scale,
        causal,
        window_size,
        softcap,
        s_aux,
    )


def _refuse(name: str, dropout_p: float, alibi_slopes: torch.Tensor | None, return_attn_probs: bool) -> None:
    if dropout_p:
        raise NotImplementedError(
            f"{name}: dropout_p: attention dropout is not supported; pass 0.0, got {dropout_p} "
            "(in a model's configuration: attention_dropout)"
        )
    if alibi_slopes is not None:
        raise NotImplementedError(f"{name}: alibi_slopes: ALiBi is not supported; pass None")
    if return_attn_probs:
        raise NotImplementedError(
            f"{name}: return_attn_probs: the probabilities are never in memory; pass False"
        )


def _check(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: str) -> None:
    dims = form.count(",") + 1
    for argument, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise ValueError(f"{name}: {argument}: expected {form}, got {list(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: {argument}: expected dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: {argument}: expected device of q, {q.device}, got {x.device}")
    if q.dtype not in _DTYPES:
        raise ValueError(f"{name}: q: expected float64, float32, bfloat16 or float16, got {q.dtype}")
    heads, head_dim = q.shape[-2:]
    if not 1 <= head_dim <= _MOST_HEAD_DIM:
        raise ValueError(f"{name}: q: expected a head size from 1 to {_MOST_HEAD_DIM}, got {head_dim}")
    if k.shape[-1] != head_dim:
        raise ValueError(f"{name}: k: expected head size of q, {head_dim}, got {k.shape[-1]}")
    if v.shape != k.shape:
        raise ValueError(f"{name}: v: expected shape of k, {list(k.shape)}, got {list(v.shape)}")
    if not k.shape[-2] or not heads or heads % k.shape[-2]:
        raise ValueError(
            f"{name}: q: expected a multiple of {k.shape[-2]} heads (the heads of k), got {heads}"
        )


def _attend(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | torch.Tensor,
    softcap: float,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    if not isinstance(softcap, (int, float)) or not softcap >= 0:
        raise ValueError(f"{name}: softcap: expected 0 (none) or more, got {softcap}")
    window = _window(name, window_size, causal)
    if s_aux is not None and (s_aux.shape != q.shape[-2:-1] or s_aux.device != q.device):
        raise ValueError(
            f"{name}: s_aux: expected {[q.shape[-2]]} (the heads of q) on {q.device}, got {list(s_aux.shape)} on "
            f"{s_aux.device}"
        )
    dispatch.refuse_transforms(name, q, k, v, s_aux)
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    is_one = v is k
    q, k, v = (_readable(x) for x in (q, k, v))
    operands = Operands(q, k, None if is_one else v, cu_seqlens_q, cu_seqlens_k)
    cap = 0.0 if softcap == math.inf else float(softcap)
    settings = Settings(max_seqlen_q, max_seqlen_k, scale, *window, cap)
    if s_aux is None and eager.serves(operands, settings):
        out, lse = eager.attention(operands, settings), None
    else:
        out, lse = forward(*operands, *settings)
    if out.shape[-1] != head_dim:
        out = out[..., :head_dim]
    return out if s_aux is None or lse is None else _with_sink(out, lse, s_aux)


def _window(name: str, window_size: Any, causal: bool) -> Window:
    """The window of a call, which may come as a tensor or as a pair of them."""
    try:
        left, right = (operator.index(bound) for bound in window_size)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: window_size: expected (left, right), -1 for no bound, got {window_size}"
        ) from None
    return Window(max(-1, left), 0 if causal else max(-1, right))


def _readable(x: torch.Tensor) -> torch.Tensor:
    """``x`` as the kernels read it: each head contiguous, padded with zeros to a multiple of 8 and to 16 at least."""
    head_dim = x.shape[-1]
    missing = max(16, head_dim + -head_dim % 8) - head_dim
    if missing:
        return F.pad(x, (0, missing))
    return x if x.stride(-1) == 1 else x.contiguous()


def _with_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Adds a key of score ``sink`` and no value: each head's probabilities shrink by what it takes of their sum."""
    share = torch.sigmoid(lse - sink.to(lse.dtype).unsqueeze(-1))
    return (out * share.transpose(-1, -2).unsqueeze(-1)).to(out.dtype)
