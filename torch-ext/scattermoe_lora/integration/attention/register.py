"""Registration of the attention implementation with transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...ops.attention.api import flash_attn_func, flash_attn_varlen_func
from .. import copied_configs
from ..wrapping import unwrap, wrap
from . import backends as paths
from . import masks as masks
from .forward import attention_forward

_registered: dict[str, Callable[..., Any]] = {}
_replaced: Any = None


def register_attention(name: str = "scattermoe_flash", hybrid: str | None = None) -> None:
    """Make ``attn_implementation=name`` available to transformers' models.

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
    copied_configs.follow("set_attn_implementation")


def unregister_attention() -> None:
    """Undo every :func:`register_attention`: transformers is as it was. Calling it again does nothing."""
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
        unwrap(flash_utils, "_lazy_imports", _replaced)
        copied_configs.unfollow("set_attn_implementation")
        _replaced = None


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

    def make(inner: list[Callable[..., Any]]) -> Callable[..., Any]:
        def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
            if implementation not in _registered:
                return inner[0](implementation, *args, **kwargs)
            return (
                flash_attn_func,
                flash_attn_varlen_func,
                None,
                flash_utils._pad_input,
                flash_utils._unpad_input,
            )

        return lazy_imports

    _replaced = wrap(flash_utils, "_lazy_imports", make)
