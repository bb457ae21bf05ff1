"""Attention as torch operators, with fake implementations and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..operator import computation, eager, flattened, register_autograd
from . import cpu
from .arguments import Operands, Settings
from .window import refuse_bad_boundaries

_TENSORS = len(Operands._fields)


def _implementation(x: torch.Tensor) -> Any:
    if dispatch.use_triton(x):
        from . import gpu

        return gpu
    return cpu


@torch.library.custom_op("scattermoe_lora::attention_forward", mutates_args=())
@computation
def attention_forward(operands: Operands, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(cap(scale * q k^T) + mask) v``, without the matrix of scores.

    Returns:
        ``[B, Sq, Hq, D]`` or ``[Tq, Hq, D]``, dtype of ``q``; and the log-sum-exp of the scores, ``[B, Hq, Sq]`` or
        ``[Hq, Tq]``, float32 (float64 for float64). A query that sees no key gets zeros and -inf.
    """
    q, k, *_ = operands
    if operands.boundaries is not None:
        cu_seqlens_q, cu_seqlens_k = operands.boundaries
        refuse_bad_boundaries("q", cu_seqlens_q, q.shape[0], settings.max_seqlen_q)
        refuse_bad_boundaries("k", cu_seqlens_k, k.shape[0], settings.max_seqlen_k)
    result: tuple[torch.Tensor, torch.Tensor] = _implementation(q).forward(operands, settings)
    return result


@attention_forward.register_fake
@flattened
def _(operands: Operands, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    q = operands.q
    *batch, rows, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((*batch, heads, rows), dtype=wide)


@torch.library.custom_op("scattermoe_lora::attention_backward", mutates_args=())
@computation
def attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    operands: Operands,
    out: torch.Tensor,
    lse: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attention_forward`, after Dao et al., *FlashAttention* (2022), appendix B.

    Nothing is added atomically: each program sums its rows in order, so the same input gives the same bits.

    Args:
        grad_out, grad_lse: Gradients of the two results; the second may be None.
        operands, settings: As in the forward.
        out, lse: The two results.

    Returns:
        ``dq``, ``dk`` and ``dv``, contiguous; with ``v`` None ``dk`` is the sum of both, and ``dv`` is empty.
    """
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _implementation(operands.q).backward(
        grad_out, grad_lse, operands, out, lse, settings
    )
    return gradients


@attention_backward.register_fake
@flattened
def _(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    operands: Operands,
    out: torch.Tensor,
    lse: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, *_ = operands
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty((0,) if v is None else v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.settings = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * len(ctx.needs_input_grad)
    *_, out, _ = saved = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    dq, dk, dv = _gradients(grad_out, grad_lse, *saved, *ctx.settings)
    rest = (None,) * (len(ctx.needs_input_grad) - 3)
    return dq, dk, None if saved[2] is None else dv, *rest


_gradients = eager(attention_backward)
forward = register_autograd(attention_forward, _backward, _setup_context)
dispatch.refuse_second_derivative("flash_attn_func", attention_backward)
