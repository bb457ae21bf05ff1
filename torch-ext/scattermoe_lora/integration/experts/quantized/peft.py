"""PEFT's view of quantized expert parameters: the logical shape and dtype, and a dense weight to merge into."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

from ...wrapping import unwrap, wrap
from .convert import make_dense
from .read import read_stack

_wrappers: dict[str, Any] = {}


def hook(names: Collection[str]) -> None:
    """Lets ``ParamWrapper`` read and merge into the quantized parameters of experts modules.

    Does nothing where PEFT is not installed, or where the hook is in place.

    Args:
        names: Experts implementations that compute with codes (read at each call). A parametrization is evaluated for
            others.
    """
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:
        return
    if _wrappers:
        return

    def make_get_param(inner: list[Callable[..., Any]]) -> Callable[..., Any]:
        def get_param(self: Any) -> Any:
            config = getattr(self.get_base_layer(), "config", None)
            runs_here = getattr(config, "_experts_implementation", None) in names
            stack = _stack(self) if runs_here else None
            return inner[0](self) if stack is None else stack

        return get_param

    def make_merge(inner: list[Callable[..., Any]]) -> Callable[..., Any]:
        def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> Any:
            adapters = set(adapter_names or self.active_adapters) - set(self.merged_adapters)
            if _wrappers and any(adapter in self.lora_A for adapter in adapters):
                decode_weight(self)
            return inner[0](self, safe_merge=safe_merge, adapter_names=adapter_names)

        return merge

    _wrappers["get_param"] = wrap(ParamWrapper, "get_param", make_get_param)
    _wrappers["merge"] = wrap(ParamWrapper, "merge", make_merge)


def unhook() -> None:
    """Undoes :func:`hook`."""
    if _wrappers:
        from peft.tuners.lora.layer import ParamWrapper

        for name in list(_wrappers):
            unwrap(ParamWrapper, name, _wrappers.pop(name))


def _stack(wrapper: Any) -> Any:
    experts = wrapper.get_base_layer()
    return read_stack(experts, wrapper.parameter_name) if hasattr(experts, "is_transposed") else None


def decode_weight(wrapper: Any) -> None:
    """Makes a wrapper's parameter dense. PEFT adds to ``param.data``, of which a quantized weight has only a copy."""
    stack = _stack(wrapper)
    if stack is None:
        return
    warnings.warn(
        f"scattermoe: merging LoRA into quantized experts makes them dense, in {stack.dtype}",
        stacklevel=3,
    )
    make_dense(wrapper.get_base_layer(), wrapper.parameter_name, f"merge: {wrapper.parameter_name}")
