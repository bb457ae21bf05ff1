"""Attention in a traced graph (``torch.compile``), where the lengths of sequences are not known until it runs.

The graph carries segments, and one operator finds out where sequences begin each time it runs. Nor can a graph look
into a mask function; but a sequence begins where a token does not see the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..ops.attention.op import attention_backward, attention_forward
from .attention_plans import Plan, Sequences, make_plan, with_plan

_HIDDEN = "a mask that a traced graph cannot look into"


def segments(
    batch: int,
    queries: int,
    kv_length: int,
    offsets: tuple[int | torch.Tensor, int],
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None,
    kind: str | None,
    config: Any,
    others: dict[str, Any],
) -> torch.Tensor | str:
    """What the mask function makes of a mask in a traced graph, or why there is no such thing.

    Args:
        kind: Of the mask function's outermost part.
        others: The other arguments of the interface.

    Returns:
        As :func:`scattermoe_lora.integration.attention_masks.mask`; the plan has no sequences and says so.
    """
    q_offset, kv_offset = offsets
    bidirectional = "allow_is_bidirectional_skip" in others
    window = others.get("local_size")
    # Functions of a model's own are in use where they have to be mapped over indices; images' spans are a union.
    if others.get("use_vmap") or kind not in ("causal", "bidirectional", "and"):
        return _HIDDEN
    if window is not None and (getattr(config, "attention_chunk_size", None) is not None or window < 2):
        return _HIDDEN
    if not isinstance(q_offset, int) or q_offset + queries - kv_offset != kv_length:
        return "queries and keys that do not end at the same token"
    device = others.get("device", "cpu")
    packed = attention_mask is None and q_offset == 0 and not bidirectional
    if packed:
        rows = torch.arange(batch, device=device)[:, None]
        later = torch.arange(1, queries, device=device)[None, :]
        starts = ~mask_function(rows, torch.zeros_like(rows), later, later - 1).expand(batch, -1)
        found = torch.nn.functional.pad(starts.cumsum(1), (1, 0)).int() + 1
    elif attention_mask is not None:
        missing = max(0, kv_length + kv_offset - attention_mask.shape[1])
        valid = torch.nn.functional.pad(attention_mask, (0, missing))
        found = valid[:, kv_offset : kv_offset + kv_length].int()
    else:
        found = torch.ones(batch, kv_length, dtype=torch.int32, device=device)
    left, right = (-1, -1) if window is None else (window if bidirectional else window - 1, window)
    reach = (left, right if bidirectional else -1)
    known = attention_mask is None and not packed
    return with_plan(found, Plan(not bidirectional, reach, None, packed, deferred=not known))


def _sequences(
    numbers: torch.Tensor, queries: int, causal: bool, packed: bool, window: tuple[int, int]
) -> Sequences | None:
    if packed:
        several = bool((numbers[:, -1] > 1).any())
        return make_plan(numbers, queries, causal, window, True, False).sequences if several else None
    valid = numbers > 0
    if valid.all():
        return None
    holes = (valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0]
    if window != (-1, -1) and bool((holes > 1).any()):
        raise ValueError(
            "scattermoe attention: a compiled model cannot attend through a window to keys with padding between them; "
            "pad to the left or right, or run the model without torch.compile"
        )
    return make_plan(numbers, queries, causal, window, False, True).sequences


def _take(rows: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    rows = rows.flatten(0, 1)
    return rows if index is None else rows.index_select(0, index)


def _put(
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
def segments_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    numbers: torch.Tensor,
    causal: bool,
    packed: bool,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`scattermoe_lora.ops.attention.op.attention_forward` of the sequences that ``numbers`` tell of.

    Args:
        q: ``[B, Sq, Hq, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: Like ``k``, or None: the keys are the values, too.
        numbers: int32 ``[B, Sk]``: with ``packed``, each token's sequence counting from 1; else 0 for padding.
        causal: Whether a query sees no later key.
        packed: What ``numbers`` are.
        scale, softcap: As there.
        left, right: Keys to either side of its own that a query sees, -1 for all.

    Returns:
        ``[B, Sq, Hq, D]``, and the log-sum-exp of the scores, ``[B, Sq, Hq]``.

    Raises:
        ValueError: Padding between keys that are seen through a window.
    """
    sequences = _sequences(numbers, q.shape[1], causal, packed, (left, right))
    q, k, v = _last_stride_one(q, k, v)
    band = (scale, left, 0 if causal else right, softcap)
    if sequences is None:
        out, lse = attention_forward(q, k, v, None, None, q.shape[1], k.shape[1], *band)
        return out, lse.transpose(1, 2).contiguous()
    at_q, at_k, *lengths = sequences
    values = None if v is None else _take(v, at_k)
    out, lse = attention_forward(_take(q, at_q), _take(k, at_k), values, *lengths, *band)
    rows = _put(out, at_q, q)
    return rows, _put(lse.t().contiguous(), at_q, rows[..., 0], float("-inf"))


@segments_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    numbers: torch.Tensor,
    causal: bool,
    packed: bool,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide)


@torch.library.custom_op("scattermoe_lora::segments_backward", mutates_args=())
def segments_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    numbers: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    packed: bool,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`segments_forward`'s first result.

    Returns:
        ``dq``, ``dk`` and ``dv``; with ``v`` None ``dk`` is the sum of both, and ``dv`` is empty.
    """
    sequences = _sequences(numbers, q.shape[1], causal, packed, (left, right))
    q, k, v = _last_stride_one(q, k, v)
    band = (scale, left, 0 if causal else right, softcap)
    if sequences is None:
        lse = lse.transpose(1, 2).contiguous()
        lengths = (q.shape[1], k.shape[1])
        return attention_backward(grad_out, None, q, k, v, None, None, out, lse, *lengths, *band)
    at_q, at_k, cu_q, cu_k, *longest = sequences
    values = None if v is None else _take(v, at_k)
    tokens = (
        _take(grad_out, at_q),
        None,
        _take(q, at_q),
        _take(k, at_k),
        values,
        cu_q,
        cu_k,
        _take(out, at_q),
    )
    dq, dk, dv = attention_backward(*tokens, _take(lse, at_q).t().contiguous(), *longest, *band)
    return _put(dq, at_q, q), _put(dk, at_k, k), dv if v is None else _put(dv, at_k, v)


@segments_backward.register_fake
def _(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    numbers: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    packed: bool,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty((0,) if v is None else v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.numbers = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _backward(
    ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    *saved, out, lse = ctx.saved_tensors
    dq, dk, dv = segments_backward(grad_out.contiguous(), *saved, out, lse, *ctx.numbers)
    return (dq, dk, None if saved[2] is None else dv, *(None,) * 7)


segments_forward.register_autograd(_backward, setup_context=_setup_context)
