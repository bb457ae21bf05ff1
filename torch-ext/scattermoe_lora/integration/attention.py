"""The attention implementation that transformers calls, and its registration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..ops.attention.api import flash_attn_func, flash_attn_varlen_func
from . import attention_masks as masks
from . import attention_paths as paths
from .attention_plans import Plan, plan_of, reshaped_back, segments_of, window_of, with_given_sequences

_registered: dict[str, Callable[..., Any]] = {}
_replaced: Any = None


def register_attention(name: str = "scattermoe_flash", hybrid: str | None = None) -> None:
    """Makes ``attn_implementation=name`` available to transformers' models.

    Each layer of such a model runs in the kernel where it holds and in transformers' own attention (sdpa, else eager)
    where it does not; the first time that a kind of layer takes either, one line of the log says so and why. Calling it
    again does nothing. A name without "flash" in it is an attention like any other to transformers; one with it
    also lets vision towers hand over all their images as one packed sequence.

    Args:
        name: The name in transformers' ``AttentionInterface`` and ``AttentionMaskInterface``.
        hybrid: Another flash attention for layers with ``head_dim <= 256``, by its name in ``AttentionInterface``
            (``"flash_attention_2"``, one that was registered) or on the Hub; None for ours in every layer.

    Raises:
        ValueError: Another implementation stands under ``name``, or none under ``hybrid``.
        ImportError: The package that ``hybrid`` needs is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    taken = {**AttentionInterface._global_mapping, **AttentionMaskInterface._global_mapping, "eager": None}
    if name in taken and AttentionInterface._global_mapping.get(name) is not _registered.get(name, taken):
        raise ValueError(
            f"register_attention: name: transformers already has an attention implementation {name!r}; "
            "choose another name, or unregister the build that took it"
        )
    if hybrid is not None:
        _check_hybrid(name, hybrid)
    current = _registered.get(name)
    if current is None or getattr(current, "keywords", {}).get("hybrid") != hybrid:
        current = functools.partial(attention_forward, hybrid=hybrid)
    masks.know_functions()
    _registered[name] = current
    AttentionInterface.register(name, current)
    AttentionMaskInterface.register(name, masks.mask)
    _answer_for_flash_functions()


def unregister_attention() -> None:
    """Undoes every :func:`register_attention`: transformers is as it was. Calling it again does nothing."""
    global _replaced
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import modeling_flash_attention_utils as flash_utils

    for name, function in _registered.items():
        # The interfaces offer no removal of their own from the mapping that register() writes to.
        if AttentionInterface._global_mapping.get(name) is function:
            del AttentionInterface._global_mapping[name]
            AttentionMaskInterface._global_mapping.pop(name, None)
        if flash_utils._loaded_implementation == name:
            flash_utils._loaded_implementation = None
    _registered.clear()
    paths.forget()
    if _replaced is not None:
        _unlink(flash_utils, _replaced)
        _replaced = None


def _unlink(flash_utils: Any, ours: Any) -> None:
    """Takes our function out of the chain of those that builds put around transformers' own.

    A wrapper that is not a build's stays around ours, which passes everything on once no name is registered.
    """
    outer = flash_utils._lazy_imports
    if outer is ours:
        flash_utils._lazy_imports = ours.scattermoe_inner[0]
        return
    while hasattr(outer, "scattermoe_inner"):
        if outer.scattermoe_inner[0] is ours:
            outer.scattermoe_inner[0] = ours.scattermoe_inner[0]
            return
        outer = outer.scattermoe_inner[0]


def _check_hybrid(name: str, hybrid: str) -> None:
    from transformers import AttentionInterface
    from transformers import modeling_flash_attention_utils as flash_utils

    if hybrid in (name, "eager") or hybrid in _registered:
        raise ValueError(f"register_attention: hybrid: expected another flash attention, got {hybrid!r}")
    if paths.is_flash_package(hybrid):
        loaded = flash_utils._loaded_implementation
        try:
            # Loads it, or says what is missing; then transformers would take it for loaded.
            flash_utils.lazy_import_flash_attention(hybrid)
        except Exception:
            flash_utils._loaded_implementation = loaded
            raise
    if hybrid not in AttentionInterface._global_mapping:
        raise ValueError(
            f"register_attention: hybrid: transformers has no attention implementation {hybrid!r}; register it first"
        )


def _answer_for_flash_functions() -> None:
    """Lets transformers, which asks for the functions behind any name with "flash" in it, have ours for our names."""
    global _replaced
    if _replaced is not None:
        return
    from transformers import modeling_flash_attention_utils as flash_utils

    # A list, so that another build, which came before and leaves first, can take itself out of the chain.
    inner: list[Callable[..., Any]] = [flash_utils._lazy_imports]

    @functools.wraps(inner[0])
    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation not in _registered:
            return inner[0](implementation, *args, **kwargs)
        return flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input

    _replaced = lazy_imports
    _replaced.scattermoe_inner = inner
    flash_utils._lazy_imports = lazy_imports


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
            ``max_length_q`` and ``max_length_k``; whatever else the model passes.

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
        plan, segments = with_given_sequences(plan, kwargs), None

    reason = paths.obstacle(call, plan)
    if reason is not None:
        segments = segments_of(plan, key) if segments is None else segments
        return paths.transformers_own(call, segments, reason, plan)
    if hybrid is not None and paths.fits_hybrid(call, plan, hybrid):
        return paths.hybrid(call, plan, segments, hybrid)
    return paths.kernel(call, plan, segments)


def _check_keys(given: int, keys: int, kv_length: int | None) -> None:
    """Refuses ``given`` keys with a mask for ``keys`` of ``kv_length``; a copy does not know how many it left out."""
    if given < keys or (given > keys and kv_length not in (None, given)):
        raise ValueError(
            f"scattermoe attention: attention_mask: expected a mask for the layer's {given} keys, got one for "
            f"{keys if kv_length is None else kv_length}; make it for the cache, and the tokens, that the layer has"
        )
