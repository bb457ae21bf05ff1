"""The weight, bias and LoRA pair that a language model's head multiplies by, read from its module."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch

from ...ops.linear_cross_entropy.decoded import DecodedWeight
from ..fused_classes import has_hooks, plain_class
from . import quantized

_log = logging.getLogger(__name__)
_logged: set[str] = set()


class Head(NamedTuple):
    """``x W^T + bias + (x A^T) B^T``, as the arguments of ``linear_cross_entropy``."""

    weight: torch.Tensor | DecodedWeight
    bias: torch.Tensor | None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None


def run_sharded(
    module: torch.nn.Module, hidden: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``run(hidden)`` in place of the forward of a layer that FSDP2 shards, whose weight is whole meanwhile.

    Its hooks gather the weight before, and again for the backward of the result.
    """
    module.forward = run
    try:
        result: torch.Tensor = module(hidden)
        return result
    finally:
        del module.forward


def is_sharded(module: Any) -> bool:
    """True of a linear layer that FSDP2 shards by itself, and that has no hooks but those that gather its weight."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule) or not isinstance(module, torch.nn.Linear):
        return False
    layer: Any = module
    state = layer._get_fsdp_state()
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return (
        type(module).forward is torch.nn.Linear.forward
        and "forward" not in module.__dict__
        and all(getattr(hook, "__self__", None) is state for hook in hooks)
        # Of the result, which then is a loss.
        and state._mp_policy.output_dtype in (None, torch.float32)
        and not torch.nn.modules.module._has_any_global_hook()
    )


def read(module: torch.nn.Module, dtype: torch.dtype) -> Head | str:
    """What ``module`` multiplies an input of ``dtype`` by; or the reason why calling it does something else, too."""
    layer, tuners = sys.modules.get("peft.tuners.lora.layer"), sys.modules.get("peft.utils.other")
    if tuners is not None and isinstance(module, tuners.ModulesToSaveWrapper):
        is_own = not module.disable_adapters and bool(module.active_adapters)
        copies: Any = module.modules_to_save
        own = copies[module.active_adapters[0]] if is_own else module.original_module
        return _obstacle(module, tuners.ModulesToSaveWrapper) or read(own, dtype)
    if layer is not None and isinstance(module, layer.LoraLayer):
        of_bits = sys.modules.get("peft.tuners.lora.bnb")
        kinds = [getattr(of_bits, name) for name in ("Linear4bit", "Linear8bitLt") if hasattr(of_bits, name)]
        around = next((kind for kind in kinds if isinstance(module, kind)), layer.Linear)
        return _obstacle(module, around) or _read_lora(module, dtype)
    own = None if torch.compiler.is_compiling() else quantized.find_reader(module)
    if own is not None:
        base, decoded_weight = own
        decoded = _obstacle(module, base) or decoded_weight(module, dtype)
        return decoded if isinstance(decoded, str) else Head(decoded, cast(Any, module).bias)
    reason = _obstacle(module, torch.nn.Linear)
    if reason is not None:
        return reason
    weight: Any = module.weight
    bias: Any = module.bias
    # A parameter that is sharded is whole only while its module runs.
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or type(weight.data) is not torch.Tensor:
        return f"the weight of the head is a {type(weight).__name__}"
    return Head(weight, bias)


def log_once(message: str) -> None:
    """Warns of what runs otherwise than asked for, the first time."""
    if message not in _logged and not torch.compiler.is_compiling():
        _logged.add(message)
        _log.warning(message)


def _obstacle(module: torch.nn.Module, base: type[torch.nn.Module]) -> str | None:
    """The reason why calling ``module`` is not the same as calling ``base``'s forward; None if it is."""
    if plain_class(module).forward is not base.forward or "forward" in module.__dict__:
        return f"the head is a {type(module).__name__} with a forward of its own"
    if has_hooks(module):
        return "the head has hooks"
    return None


def _read_lora(module: Any, dtype: torch.dtype) -> Head | str:
    base = read(module.get_base_layer(), dtype)
    if isinstance(base, str) or module.disable_adapters or module.merged:
        return base
    names = [name for name in module.active_adapters if name in module.lora_A]
    a, b = [], []
    for name in names:
        if name in module.lora_variant or module.lora_bias.get(name):
            return f"adapter {name} of the head is more than two factors"
        dropout = module.lora_dropout[name]
        if not isinstance(dropout, torch.nn.Identity) and module.training and dropout.p > 0:
            return f"adapter {name} of the head drops inputs"
        a.append(module.lora_A[name].weight)
        b.append(module.lora_B[name].weight * module.scaling[name])
    if not names:
        return base
    return base._replace(lora_a=torch.cat(a), lora_b=torch.cat(b, dim=1))
