"""Attention as torch operators, with fake implementations and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from . import cpu
from .window import Window, refuse_bad_boundaries


@torch.library.custom_op("scattermoe_lora::attention_forward", mutates_args=())
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(cap(scale * q k^T) + mask) v``, without the matrix of scores.

    Args:
        q: ``[B, Sq, Hq, D]``, or ``[Tq, Hq, D]`` with ``cu_seqlens``; the last stride is 1, as in ``k`` and ``v``.
        k: ``[B, Sk, Hkv, D]`` or ``[Tk, Hkv, D]``.
        v: Like ``k``, or None: the keys are the values, too.
        cu_seqlens_q, cu_seqlens_k: ``[B + 1]`` int32, where each sequence starts; both or neither.
        max_seqlen_q, max_seqlen_k: No sequence is longer.
        scale: Factor of the scores.
        left, right: The fields of a :class:`scattermoe_lora.ops.attention.window.Window`.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: they stay.

    Returns:
        ``[B, Sq, Hq, D]`` or ``[Tq, Hq, D]``, dtype of ``q``; and the log-sum-exp of the scores, ``[B, Hq, Sq]`` or
        ``[Hq, Tq]``, float32 (float64 for float64). A query that sees no key gets zeros and -inf.
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        refuse_bad_boundaries("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        refuse_bad_boundaries("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    window = Window(left, right).within(max_seqlen_q, max_seqlen_k)
    with dispatch.undisturbed(q):
        if dispatch.use_triton(q):
            from . import gpu

            longest = (max_seqlen_q, max_seqlen_k)
            return gpu.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, scale, window, softcap)
        return cpu.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, window, softcap)


@attention_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, rows, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((*batch, heads, rows), dtype=wide)


@torch.library.custom_op("scattermoe_lora::attention_backward", mutates_args=())
def attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attention_forward`, after Dao et al., *FlashAttention* (2022), appendix B.

    Nothing is added atomically: each program sums its rows in order, so the same input gives the same bits.

    Args:
        grad_out, grad_lse: Gradients of the two results; the second may be None.
        out, lse: The two results.

    Returns:
        ``dq``, ``dk`` and ``dv``, contiguous; with ``v`` None ``dk`` is the sum of both, and ``dv`` is empty.
    """
    window = Window(left, right).within(max_seqlen_q, max_seqlen_k)
    saved = (grad_out, grad_lse, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse)
    with dispatch.undisturbed(q):
        if dispatch.use_triton(q):
            from . import gpu

            return gpu.backward(*saved, (max_seqlen_q, max_seqlen_k), scale, window, softcap)
        return cpu.backward(*saved, scale, window, softcap)


@attention_backward.register_fake
def _(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty((0,) if v is None else v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.numbers = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 11
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    dq, dk, dv = attention_backward(
        grad_out, grad_lse, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, *ctx.numbers
    )
    return (dq, dk, None if v is None else dv, *(None,) * 8)


attention_forward.register_autograd(_backward, setup_context=_setup_context)
