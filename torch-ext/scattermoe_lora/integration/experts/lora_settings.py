"""LoRA settings that PEFT refuses on parameters, accepted where the wrapped experts run here.

PEFT's own path computes with a merged weight, which has room for none of them: dropout needs the input of the low-rank
product, and a bias is added to its output. It refuses DoRA there as well.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch

from ..wrapping import unwrap, wrap
from .factors import outputs, weight_norms

# What a config has of these where it uses none of them.
_PLAIN = {"lora_dropout": 0.0, "lora_bias": False, "use_dora": False}
_wrappers: dict[str, Any] = {}


def accept(names: Collection[str]) -> None:
    """Lets ``ParamWrapper`` take dropout, biases and DoRA for experts whose implementation is in ``names``.

    PEFT's refusal stays for all other parameters.
    """
    from peft.tuners.lora.layer import ParamWrapper

    if _wrappers:
        return

    def make_init(inner: list[Callable[..., None]]) -> Callable[..., None]:
        def __init__(
            self: Any, base_layer: Any, adapter_name: str, *args: Any, config: Any, **kwargs: Any
        ) -> None:
            special = _is_special(config) and runs_here(base_layer, names)
            plain = _plain(config) if special else config
            inner[0](self, base_layer, adapter_name, *args, config=plain, **kwargs)
            if special:
                _add(self, adapter_name, config)

        return __init__

    def make_update(inner: list[Callable[..., None]]) -> Callable[..., None]:
        def update_layer(self: Any, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
            special = _is_special(config) and runs_here(self, names)
            inner[0](self, adapter_name, *args, config=_plain(config) if special else config, **kwargs)
            if special:
                _add(self, adapter_name, config)

        return update_layer

    _wrappers["__init__"] = wrap(ParamWrapper, "__init__", make_init)
    _wrappers["update_layer"] = wrap(ParamWrapper, "update_layer", make_update)


def refuse() -> None:
    """Undoes :func:`accept`. Adapters that were made keep their settings, can be merged, and run nowhere else."""
    from peft.tuners.lora.layer import ParamWrapper

    while _wrappers:
        unwrap(ParamWrapper, *_wrappers.popitem())


def runs_here(module: Any, names: Collection[str]) -> bool:
    """True if a module, or what PEFT's wrappers wrap, is an experts module whose implementation is in ``names``."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    config = getattr(base, "config", None)
    return hasattr(base, "has_gate") and getattr(config, "_experts_implementation", None) in names


def obstacle_of(wrapper: Any) -> str | None:
    """The reason why a wrapper's adapters cannot be factors of the fused experts, or None where they can."""
    experts = wrapper.get_base_layer()
    weights = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    if wrapper.parameter_name not in weights:
        return f"{wrapper.parameter_name} is none of the weights {' and '.join(weights)}"
    if wrapper.num_experts == 1 and not wrapper._did_swap_in_out_features:
        return f"PEFT takes {wrapper.parameter_name} of a single expert for the weight of a plain layer"
    return None


def _is_special(config: Any) -> bool:
    return any(getattr(config, name, plain) != plain for name, plain in _PLAIN.items())


def _plain(config: Any) -> Any:
    plain = copy.copy(config)
    vars(plain).update(_PLAIN)
    return plain


def _add(wrapper: Any, adapter: str, config: Any) -> None:
    """Gives an adapter, which PEFT has made without them, the settings of its config.

    They are where PEFT has them for linear layers, and are saved and loaded from there: ``lora_dropout``, the bias of
    ``lora_B`` (here ``[E, out]``), and ``lora_magnitude_vector`` (``[E, out]``).

    Raises:
        ValueError: The parameter's adapters run through PEFT's own path, which has none of these settings.
    """
    obstacle = obstacle_of(wrapper)
    if obstacle is not None:
        used = [name for name, plain in _PLAIN.items() if getattr(config, name) != plain]
        raise ValueError(
            f"scattermoe: LoRA on {wrapper.parameter_name} does not work with {', '.join(used)}: {obstacle}"
        )
    # What PEFT's own path does, and merging, are this class's from now on, whether the kernel is registered or not.
    from .param_wrapper import ParamWrapper

    wrapper.__class__ = ParamWrapper
    if config.lora_dropout:
        wrapper.lora_dropout[adapter] = torch.nn.Dropout(config.lora_dropout)
    if config.lora_bias:
        _add_bias(wrapper, adapter, bool(config.init_lora_weights))
    if config.use_dora:
        _add_magnitude(wrapper, adapter)
    wrapper.set_adapter(wrapper.active_adapters, inference_mode=config.inference_mode)


def _add_bias(wrapper: Any, adapter: str, zero: bool) -> None:
    experts = wrapper.get_base_layer()
    if not experts.has_bias:
        from peft.utils.warning import PeftWarning

        warnings.warn(
            f"lora_bias=True: the experts of {type(experts).__name__} have no biases of their own to merge it into, so "
            "this adapter can be used, saved and loaded, but not merged",
            PeftWarning,
            stacklevel=4,
        )
    high = wrapper.lora_B[adapter]
    bias = high.weight.new_zeros(wrapper.num_experts, outputs(wrapper))
    if not zero:
        torch.nn.init.uniform_(bias, -1 / math.sqrt(wrapper.r[adapter]), 1 / math.sqrt(wrapper.r[adapter]))
    high.bias = torch.nn.Parameter(bias)
    wrapper.lora_bias[adapter] = True


def _add_magnitude(wrapper: Any, adapter: str) -> None:
    from peft.tuners.lora.dora import DoraLinearLayer

    if wrapper.lora_A[adapter].weight.is_meta:
        norms = wrapper.lora_A[adapter].weight.new_empty(wrapper.num_experts, outputs(wrapper))
    else:
        norms = weight_norms(wrapper, adapter)
    layer = DoraLinearLayer(fan_in_fan_out=False)
    layer.weight = torch.nn.Parameter(norms)
    wrapper.lora_magnitude_vector[adapter] = layer
    wrapper.use_dora[adapter] = True
