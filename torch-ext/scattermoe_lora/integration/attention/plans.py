"""Masks as the attention kernels take them: causal or not, a window, and where in a batch the sequences lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ...ops.attention.sequences import Sequences, packed_sequences, padded_sequences

_PLAN = "_scattermoe_plan"
_DIVIDED = "_scattermoe_divided"
# A plan's header in each element: the sequence's number below, these bits and the window's left end above.
_NUMBER_BITS = 30
_CAUSAL, _BOTH_WAYS, _HEADER, _LEFT_BIT = 1, 2, 4, 3


class Plan(NamedTuple):
    """A mask that the kernels can express.

    Attributes:
        causal: Whether a query sees no later key; the last query is aligned with the last key.
        window: Keys to the left and to the right of its own that a query sees, -1 for all.
        sequences: None where every row of the batch is one sequence.
        packed: Whether a row holds several sequences, so that no query sees another sequence's keys.
        deferred: Whether the sequences are still to be found, when a traced graph runs.
        queries: The number of queries that the sequences are for; None where any will do.
        kv_length: The number of a layer's keys, among them those that segments leave out; None where it is not known.
    """

    causal: bool
    window: tuple[int, int]
    sequences: Sequences | None
    packed: bool = False
    deferred: bool = False
    queries: int | None = None
    kv_length: int | None = None


def with_plan(segments: torch.Tensor, plan: Plan) -> torch.Tensor:
    """``segments`` in memory of their own, with ``plan`` as an attribute that :func:`plan_of` finds.

    Causality and the window are in the elements, too, int64, so that a copy is not read as something else. Not so for a
    deferred plan: within a graph nothing gets lost.
    """
    if not plan.deferred:
        left, right = plan.window
        flags = _HEADER | (_CAUSAL if plan.causal else 0) | (_BOTH_WAYS if right >= 0 else 0)
        header = ((left + 1) << _LEFT_BIT | flags) << _NUMBER_BITS
        segments = torch.where(segments > 0, segments.long() + header, 0)
    segments = segments.contiguous()
    setattr(segments, _PLAN, plan)
    return segments


def make_plan(
    segments: torch.Tensor,
    queries: int,
    causal: bool,
    window: tuple[int, int],
    packed: bool,
    padded: bool,
) -> Plan:
    """The plan for ``segments`` ``[B, K]``: each key's sequence counting from 1, or 0 for padding.

    Where the mask is causal or has a window, the last ``queries`` of them are queries, too, and padding's take no part:
    nothing sees them later. Elsewhere all queries do, because they need not be the same tokens as the keys.
    """
    sequences = None
    if packed:
        sequences = packed_sequences(segments)
    elif padded:
        sequences = padded_sequences(segments > 0, queries, causal or window != (-1, -1))
    return Plan(causal, window, sequences, packed, queries=queries)


def plan_of(segments: torch.Tensor, queries: int, causal: bool, window: tuple[int, int]) -> Plan:
    """The plan that ``segments`` came with, made anew where something copied the tensor (models over several GPUs).

    It is made anew for another number of ``queries``, too: of a mask that is not causal, a model may have asked for one
    row. ``causal`` and ``window`` count for a padding mask ``[B, K]`` of a model's own, which never had a plan.

    Raises:
        ValueError: Queries that the mask, which is causal or has a window, says nothing of.
    """
    plan: Plan | None = getattr(segments, _PLAN, None)
    if plan is not None:
        if plan.queries is None or plan.queries == queries:
            return plan
        if queries > plan.queries and (plan.causal or plan.window != (-1, -1)):
            raise ValueError(
                f"scattermoe attention: attention_mask: expected a mask for the layer's {queries} queries, got one for "
                f"{plan.queries}; make it with inputs_embeds of the layer's length"
            )
        padded = plan.sequences is not None and not plan.packed
        again = make_plan(segments, queries, plan.causal, plan.window, plan.packed, padded)
        return again._replace(kv_length=plan.kv_length)
    smallest, largest = torch.stack(segments.long().aminmax()).tolist()
    header, number = largest >> _NUMBER_BITS, largest & (1 << _NUMBER_BITS) - 1
    if header:
        left = (header >> _LEFT_BIT) - 1
        causal, window = bool(header & _CAUSAL), (left, left if header & _BOTH_WAYS else -1)
    return make_plan(segments, queries, causal, window, number > 1, smallest < 1)


def reshaped_back(mask: torch.Tensor) -> torch.Tensor:
    """Segments ``[B, K]`` where a model made ``[B, 1, 1, K]`` of those of a mask function; any other mask as it is."""
    if mask.dtype != torch.int64 or mask.dim() != 4 or mask.shape[1:3] != (1, 1) or not mask.numel():
        return mask
    # A graph holds no headers, and a header that is looked for there breaks it.
    if torch.compiler.is_compiling() or int(mask.max()) >> _NUMBER_BITS == 0:
        return mask
    return mask[:, 0, 0]


def window_of(causal: bool, sliding_window: int | None, keys: int) -> tuple[int, int]:
    """A window where a query sees ``sliding_window`` keys, its own among them (if not causal, to both sides)."""
    if sliding_window is None or sliding_window >= keys:
        return -1, -1
    return sliding_window - 1, (-1 if causal else sliding_window - 1)


def with_model_sequences(plan: Plan, arguments: Mapping[str, Any]) -> Plan:
    """``plan`` for packed sequences whose lengths a model hands over, by transformers' names for them.

    Raises:
        ValueError: Lengths of the queries without those of the keys.
    """
    if arguments.get("cu_seq_lens_k") is None:
        raise ValueError(
            "scattermoe attention: cu_seq_lens_k: expected where the sequences of cu_seq_lens_q begin in the keys, "
            "got None; pass both"
        )
    (cu_query, max_query), (cu_key, max_key) = (_lengths(arguments, side) for side in "qk")
    sequences = Sequences(None, None, cu_query, cu_key, max_query, max_key)
    return plan._replace(sequences=sequences, packed=True, deferred=False)


def with_restarting_positions(
    plan: Plan, segments: torch.Tensor | None, position_ids: torch.Tensor | None, shape: tuple[int, int, int]
) -> tuple[Plan, torch.Tensor | None]:
    """``plan`` and ``segments``, divided where the positions of a causal layer without padding start again.

    transformers' masks say so only if there is no cache (some models' never); its wrapper of FlashAttention reads the
    positions as here, of a batch of one: a sequence begins at each position that is the smallest. Earlier keys have no
    positions here, so that nothing is divided unless the cache was empty.

    Args:
        position_ids: ``[B or 1, S]``; what has another shape is no position of a token, and is left alone.
        shape: B, Sq and Sk.
    """
    batch, queries, keys = shape
    if position_ids is None or position_ids.shape not in ((batch, queries), (1, queries)):
        return plan, segments
    deferred = plan.deferred and plan.packed
    unread = plan.sequences is None and plan.deferred == deferred == torch.compiler.is_compiling()
    if not plan.causal or not unread or queries != keys or queries == 1:
        return plan, segments
    # Looked at once for all layers that have the same mask: the answer waits for the device.
    earlier = getattr(segments, _DIVIDED, None)
    if earlier is not None and earlier[0] is position_ids:
        return earlier[1]
    starts = position_ids[:, 1:] == position_ids.amin(1, keepdim=True)
    numbers = torch.nn.functional.pad(starts.cumsum(1), (1, 0)).int().expand(batch, -1) + 1
    if deferred:
        # Each side's restarts make a new number; both count from 1.
        return plan, numbers if segments is None else numbers + segments - 1
    divided = plan, segments
    if bool(starts.any()):
        divided = make_plan(numbers, queries, True, plan.window, packed=True, padded=False), numbers
    if segments is not None:
        setattr(segments, _DIVIDED, (position_ids, divided))
    return divided


def _lengths(arguments: Mapping[str, Any], side: str) -> tuple[torch.Tensor, int]:
    """First tokens of the sequences, and the longest's length, which waits for the device where nobody says it."""
    cu, longest = arguments[f"cu_seq_lens_{side}"].int(), arguments.get(f"max_length_{side}")
    return cu, int(cu.diff().max() if longest is None else longest)


def segments_of(plan: Plan, key: torch.Tensor) -> torch.Tensor:
    """Segments ``[B, K]`` of a plan without padding for keys ``[B, H, K, D]``."""
    batch, _, keys, _ = key.shape
    if plan.sequences is None:
        return torch.ones(1, 1, dtype=torch.int32, device=key.device).expand(batch, keys)
    tokens = torch.arange(batch * keys, dtype=torch.int32, device=key.device)
    return (
        torch.bucketize(tokens, plan.sequences.cu_key[1:], right=True, out_int32=True).view(batch, keys) + 1
    )


def dense(plan: Plan, segments: torch.Tensor, queries: int) -> torch.Tensor:
    """The mask that ``plan`` and ``segments`` ``[B, K]`` stand for: bool ``[B, 1, queries, K]``, True where seen."""
    keys = segments.shape[1]
    k = torch.arange(keys, device=segments.device)
    q = torch.arange(keys - queries, keys, device=segments.device)[:, None]
    left, right = plan.window
    visible = (segments > 0)[:, None, None, :].expand(-1, 1, queries, -1)
    if plan.packed:
        visible = visible & (segments[:, None, keys - queries :, None] == segments[:, None, None, :])
    if plan.causal:
        visible = visible & (k <= q)
    if left >= 0:
        visible = visible & (k >= q - left)
    if right >= 0:
        visible = visible & (k <= q + right)
    return visible
