"""PEFT's view of quantized expert parameters: the logical shape and dtype, and a dense weight to merge into, whole or
split over processes along its experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

from ...wrapping import unwrap, wrap
from ..expert_parallel import is_split, split_as
from .convert import make_dense, read_own
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
                if safe_merge and is_split(self.get_base_layer(), self.get_param()):
                    # PEFT would set the parameter's data, which leaves this process's part as it is.
                    _refuse_not_finite(self, adapters)
                    safe_merge = False
            return inner[0](self, safe_merge=safe_merge, adapter_names=adapter_names)

        return merge

    def make_get_delta_weight(inner: list[Callable[..., Any]]) -> Callable[..., Any]:
        def get_delta_weight(self: Any, *args: Any, **kwargs: Any) -> Any:
            delta, parameter = inner[0](self, *args, **kwargs), self.get_param()
            # FSDP2 splits factors, too, and so what they make.
            splits = is_split(self.get_base_layer(), parameter) and not hasattr(delta, "placements")
            return split_as(delta, parameter) if splits else delta

        return get_delta_weight

    _wrappers["get_delta_weight"] = wrap(ParamWrapper, "get_delta_weight", make_get_delta_weight)
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


def _refuse_not_finite(wrapper: Any, adapters: Collection[str]) -> None:
    """Raises ValueError where the wrapper's weight with these adapters is not finite."""
    weight = wrapper.get_param().detach().clone()
    for adapter in adapters:
        weight += wrapper.get_delta_weight(adapter).to(weight.dtype)
    if not weight.isfinite().all().full_tensor():
        raise ValueError(
            f"scattermoe: LoRA on {wrapper.parameter_name}: merging gives NaN or infinite weights"
        )


def decode_weight(wrapper: Any) -> None:
    """Makes a wrapper's parameter dense. PEFT adds to ``param.data``, of which a quantized weight has only a copy.

    Raises:
        NotImplementedError: FSDP2 has split the parameter, and knows of no other.
    """
    experts = wrapper.get_base_layer()
    stack = read_own(experts, wrapper.parameter_name) if hasattr(experts, "is_transposed") else None
    if stack is None:
        return
    parameter = experts._parameters.get(wrapper.parameter_name)
    if is_split(experts, parameter) and not getattr(experts, "_is_expert_parallel", False):
        raise NotImplementedError(
            f"scattermoe: LoRA on {wrapper.parameter_name}: not merged into quantized experts that FSDP2 has split; "
            "load the adapter into a whole model and merge there"
        )
    warnings.warn(
        f"scattermoe: merging LoRA into quantized experts makes them dense, in {stack.dtype}",
        stacklevel=3,
    )
    make_dense(experts, wrapper.parameter_name, f"merge: {wrapper.parameter_name}")
