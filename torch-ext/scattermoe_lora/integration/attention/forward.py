"""The attention implementation that transformers calls."""

from __future__ import annotations

from typing import Any

import torch

from . import backends as paths
from . import masks as masks
from .plans import (
    Plan,
    plan_of,
    reshaped_back,
    segments_of,
    window_of,
    with_model_sequences,
    with_restarting_positions,
)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    hybrid: str | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Forward of an attention layer, the signature that transformers' ``AttentionInterface`` calls.

    What the mask says counts; ``is_causal`` does where there is no mask, and so does ``sliding_window`` if causal.

    Args:
        module: The attention module.
        query: ``[B, Hq, Sq, D]``.
        key, value: ``[B, Hkv, Sk, D]``.
        attention_mask: What the mask function registered with it made, a padding mask ``[B, Sk]``, a dense mask,
            or None.
        dropout, scaling, softcap, s_aux: As transformers passes them.
        sliding_window: Keys that a query sees, its own among them.
        is_causal: None for ``module.is_causal``.
        hybrid: As in :func:`register_attention`.
        **kwargs: ``cu_seq_lens_q`` and ``cu_seq_lens_k`` of packed sequences, both or none, and where they are known
            ``max_length_q`` and ``max_length_k``; ``position_ids`` ``[B or 1, S]``, whose restarts divide a causal
            layer's sequences where the mask does not and the keys are the queries' own; what else the model passes.

    Returns:
        ``[B, Sq, Hq, D]``, and the attention weights where eager mode ran, else None.

    Raises:
        NotImplementedError: A paged cache (continuous batching).
        ValueError: A mask ``[B, K]`` for other keys or queries than the layer's.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            "scattermoe attention: continuous batching (a paged cache) is not supported; "
            'use attn_implementation="sdpa" for it'
        )
    shared = value is key
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key = query.to(dtype), key.to(dtype)
        value = key if shared else value.to(dtype)
    call = paths.Call(
        module, query, key, value, dropout, scaling, sliding_window, softcap, is_causal, s_aux, kwargs
    )
    if attention_mask is not None:
        attention_mask = reshaped_back(attention_mask)
    if attention_mask is not None and attention_mask.dim() != 2:
        return paths.transformers_own(call, attention_mask, masks.reason_of(attention_mask))

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    segments = attention_mask
    # Without a mask, transformers' own attentions know of causality at most. We keep a window with it, as
    # FlashAttention does; a layer that sees both ways names the one that its masks have when there are any.
    window = (-1, -1) if segments is None and not causal else window_of(causal, sliding_window, key.shape[2])
    plan = Plan(causal, window, None)
    if segments is not None:
        plan = plan_of(segments, query.shape[2], causal, window)
        keys = segments.shape[1]
        _check_keys(key.shape[2], keys, keys if plan.deferred else plan.kv_length)
        # Keys after the last query's are the empty rest of a static cache.
        if key.shape[2] > keys:
            key = key[:, :, :keys]
            call = call._replace(key=key, value=key if shared else value[:, :, :keys])
    if plan.sequences is None and kwargs.get("cu_seq_lens_q") is not None:
        plan, segments = with_model_sequences(plan, kwargs), None
    else:
        plan, segments = with_restarting_positions(
            plan, segments, kwargs.get("position_ids"), (query.shape[0], query.shape[2], key.shape[2])
        )

    reason = paths.obstacle(call, plan)
    if reason is not None:
        segments = segments_of(plan, key) if segments is None else segments
        return paths.transformers_own(call, segments, reason, plan)
    if hybrid is not None and paths.fits_hybrid(call, plan, hybrid):
        return paths.hybrid(call, plan, segments, hybrid)
    return paths.kernel(call, plan, segments)


def _check_keys(length: int, keys: int, kv_length: int | None) -> None:
    """Refuse ``length`` keys with a mask for ``keys`` of ``kv_length``; a copy does not know how many it left out."""
    if length < keys or (length > keys and kv_length not in (None, length)):
        raise ValueError(
            f"scattermoe attention: attention_mask: expected a mask for the layer's {length} keys, got one for "
            f"{keys if kv_length is None else kv_length}; make it for the cache, and the tokens, that the layer has"
        )
