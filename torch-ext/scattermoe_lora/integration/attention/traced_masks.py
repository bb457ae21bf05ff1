"""Masks in a traced graph (``torch.compile``), where the lengths of sequences are not known until it runs.

The graph carries segments, and an operator (:mod:`scattermoe_lora.ops.attention.segments`) finds out where sequences
begin each time it runs. Nor can a graph look into a mask function; but a sequence begins where a token does not see the
one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .plans import Plan, with_plan

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
    """The segments that stand for a mask in a traced graph, or the reason why none do.

    Args:
        kind: Of the mask function's outermost part.
        others: The other arguments of the interface.

    Returns:
        As :func:`scattermoe_lora.integration.attention.masks.mask`; the plan has no sequences and says so.
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
        numbers = torch.nn.functional.pad(starts.cumsum(1), (1, 0)).int() + 1
    elif attention_mask is not None:
        missing = max(0, kv_length + kv_offset - attention_mask.shape[1])
        valid = torch.nn.functional.pad(attention_mask, (0, missing))
        numbers = valid[:, kv_offset : kv_offset + kv_length].int()
    else:
        numbers = torch.ones(batch, kv_length, dtype=torch.int32, device=device)
    left, right = (-1, -1) if window is None else (window if bidirectional else window - 1, window)
    reach = (left, right if bidirectional else -1)
    deferred = packed or attention_mask is not None
    return with_plan(numbers, Plan(not bidirectional, reach, None, packed, deferred=deferred))
