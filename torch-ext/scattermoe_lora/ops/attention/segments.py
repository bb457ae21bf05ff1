"""Attention of sequences whose lengths are data, as torch operators for a traced graph (``torch.compile``).

The graph carries a number for each token, and the operator finds out where sequences begin each time it runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import dispatch
from ..operator import flattened
from .op import attention_backward, attention_forward
from .sequences import Sequences, packed_sequences, padded_sequences, select_tokens


class Operands(NamedTuple):
    """Queries, keys and values, and the sequence of each token.

    Attributes:
        q: ``[B, Sq, Hq, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: Like ``k``, or None: the keys are the values, too.
        numbers: int32 ``[B, Sk]``: where packed, each token's sequence counting from 1; else 0 for padding.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    numbers: torch.Tensor


class Settings(NamedTuple):
    """The numbers that scores and mask depend on.

    Attributes:
        causal: Whether a query sees no later key.
        packed: Whether a row holds several sequences.
        scale: Factor of the scores.
        left, right: Keys to either side of its own that a query sees, -1 for all.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: they stay.
    """

    causal: bool
    packed: bool
    scale: float
    left: int
    right: int
    softcap: float

    @property
    def band(self) -> tuple[float, int, int, float]:
        """The arguments of :func:`scattermoe_lora.ops.attention.op.attention_forward` behind the lengths."""
        return self.scale, self.left, 0 if self.causal else self.right, self.softcap


_TENSORS = len(Operands._fields)


def _sequences(operands: Operands, settings: Settings) -> Sequences | None:
    """The places of the sequences; None where every row is one."""
    numbers, queries = operands.numbers, operands.q.shape[1]
    if settings.packed:
        return packed_sequences(numbers) if bool((numbers[:, -1] > 1).any()) else None
    valid = numbers > 0
    if valid.all():
        return None
    has_window = (settings.left, settings.right) != (-1, -1)
    runs = (valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0]
    if has_window and bool((runs > 1).any()):
        raise ValueError(
            "scattermoe attention: a compiled model cannot attend through a window to keys with padding between them; "
            "pad to the left or right, or run the model without torch.compile"
        )
    return padded_sequences(valid, queries, same_tokens=settings.causal or has_window)


def _place(
    tokens: torch.Tensor, index: torch.Tensor | None, like: torch.Tensor, fill: float = 0
) -> torch.Tensor:
    """The tokens at their places in a tensor of ``like``'s shape."""
    if index is None:
        return tokens.view(like.shape)
    rows = tokens.new_full((like.shape[0] * like.shape[1], *like.shape[2:]), fill)
    return rows.index_copy_(0, index, tokens).view(like.shape)


def _last_stride_one(*tensors: torch.Tensor | None) -> list[Any]:
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


@torch.library.custom_op("scattermoe_lora::segments_forward", mutates_args=())
@flattened
def segments_forward(operands: Operands, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`scattermoe_lora.ops.attention.op.attention_forward` of the sequences that the tokens' numbers tell of.

    Returns:
        ``[B, Sq, Hq, D]``, and the log-sum-exp of the scores, ``[B, Sq, Hq]``.

    Raises:
        ValueError: Padding between keys that are seen through a window.
    """
    sequences = _sequences(operands, settings)
    q, k, v = _last_stride_one(*operands[:3])
    if sequences is None:
        out, lse = attention_forward(q, k, v, None, None, q.shape[1], k.shape[1], *settings.band)
        return out, lse.transpose(1, 2).contiguous()
    at_q, at_k, *lengths = sequences
    values = None if v is None else select_tokens(v, at_k)
    out, lse = attention_forward(
        select_tokens(q, at_q), select_tokens(k, at_k), values, *lengths, *settings.band
    )
    rows = _place(out, at_q, q)
    return rows, _place(lse.t().contiguous(), at_q, rows[..., 0], float("-inf"))


@segments_forward.register_fake
@flattened
def _(operands: Operands, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    q = operands.q
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide)


@torch.library.custom_op("scattermoe_lora::segments_backward", mutates_args=())
@flattened
def segments_backward(
    grad_out: torch.Tensor, operands: Operands, out: torch.Tensor, lse: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`segments_forward`'s first result.

    Returns:
        ``dq``, ``dk`` and ``dv``; with ``v`` None ``dk`` is the sum of both, and ``dv`` is empty.
    """
    sequences = _sequences(operands, settings)
    q, k, v = _last_stride_one(*operands[:3])
    if sequences is None:
        lse = lse.transpose(1, 2).contiguous()
        lengths = (q.shape[1], k.shape[1])
        return attention_backward(grad_out, None, q, k, v, None, None, out, lse, *lengths, *settings.band)
    at_q, at_k, cu_q, cu_k, *longest = sequences
    tokens = [select_tokens(x, at) for x, at in ((grad_out, at_q), (q, at_q), (k, at_k), (out, at_q))]
    values = None if v is None else select_tokens(v, at_k)
    lse = select_tokens(lse, at_q).t().contiguous()
    dq, dk, dv = attention_backward(
        tokens[0], None, *tokens[1:3], values, cu_q, cu_k, tokens[3], lse, *longest, *settings.band
    )
    return _place(dq, at_q, q), _place(dk, at_k, k), dv if v is None else _place(dv, at_k, v)


@segments_backward.register_fake
@flattened
def _(
    grad_out: torch.Tensor, operands: Operands, out: torch.Tensor, lse: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, _ = operands
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty((0,) if v is None else v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.settings = inputs[_TENSORS:]
    ctx.mark_non_differentiable(output[1])


def _backward(
    ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors
    dq, dk, dv = segments_backward(grad_out.contiguous(), *saved, *ctx.settings)
    rest = (None,) * (len(ctx.needs_input_grad) - 3)
    return dq, dk, None if saved[2] is None else dv, *rest


segments_forward.register_autograd(_backward, setup_context=_setup_context)
dispatch.refuse_second_derivative("scattermoe attention", segments_backward)
