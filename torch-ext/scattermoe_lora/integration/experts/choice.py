"""A word on models that let themselves be given an experts implementation that none of their layers asks for."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection
from typing import Any

from ..wrapping import unwrap, wrap

# Names of the number of experts in configs.
_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_wrapper: Any = None
_warned: set[type] = set()


def watch(names: Collection[str]) -> None:
    """Lets a model of experts that are not transformers' common kind warn when it is given one of ``names``.

    transformers asks ``get_correct_experts_implementation`` for each model that is made, and for each that is set to
    another implementation, and takes any name for any model.
    """
    global _wrapper
    from transformers import PreTrainedModel

    def make(inner: list[Callable[..., str]]) -> Callable[..., str]:
        def get_correct_experts_implementation(self: Any, *args: Any, **kwargs: Any) -> str:
            name = inner[0](self, *args, **kwargs)
            if name in names:
                _warn_once(self, name)
            return name

        return get_correct_experts_implementation

    if _wrapper is None:
        _wrapper = wrap(PreTrainedModel, "get_correct_experts_implementation", make)


def unwatch() -> None:
    """Undoes :func:`watch`."""
    global _wrapper
    from transformers import PreTrainedModel

    if _wrapper is not None:
        unwrap(PreTrainedModel, "get_correct_experts_implementation", _wrapper)
    _wrapper = None
    _warned.clear()


def _warn_once(model: Any, name: str) -> None:
    numbers = [getattr(model.config, number, None) for number in _NUMBERS]
    has_experts = any(isinstance(number, int) and number > 1 for number in numbers)
    if not has_experts or type(model.config) in _warned or _asks(type(model)):
        return
    _warned.add(type(model.config))
    warnings.warn(
        f"scattermoe: {type(model).__name__}: experts_implementation={name!r} changes nothing: this model's experts do "
        "not ask for an implementation (no class of theirs carries @use_experts_implementation)",
        stacklevel=4,
    )


def _asks(kind: type) -> bool:
    """True if a class beside a model's, or beside one that it derives from, is an experts module that can be given one.

    The decorator gives each such class an ``_apply_gate``.
    """
    from transformers import PreTrainedModel

    names = {base.__module__ for base in kind.__mro__ if issubclass(base, PreTrainedModel)}
    members = [member for name in names if name in sys.modules for member in vars(sys.modules[name]).values()]
    return any(isinstance(member, type) and hasattr(member, "_apply_gate") for member in members)
