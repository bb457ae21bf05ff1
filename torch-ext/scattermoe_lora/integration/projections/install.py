"""LoRA on the linear layers of a model, computed with every term added in place; and one call that undoes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from ..subclassing import become, subclass_with
from . import forward, groups


def fuse_projections(model: torch.nn.Module) -> int:
    """Runs PEFT's LoRA on linear layers fused: the base product, and the low-rank terms added to its result in place.

    Every layer that PEFT has wrapped is one operator (:func:`~scattermoe_lora.lora_linear`), forward and backward;
    layers that their parent calls with one input (queries, keys and values; gate and up) are one operator together
    while gradients are recorded, outside of compiled code. A base layer of another kind than ``torch.nn.Linear``
    (bitsandbytes, float8, torchao, one with hooks) is called as it was, and the low-rank terms are added to what it
    returns. What is not covered (DoRA and other variants, adapters by sample) runs through PEFT's own forward, and a
    warning says why. Parameters, buffers, ``state_dict`` and adapters stay as they are: adapters can be added,
    switched, merged, saved and deleted as before. Calling it again covers layers that were added since.

    Args:
        model: A model that PEFT has put LoRA into, or part of one.

    Returns:
        The number of layers in ``model`` that run fused.

    Raises:
        ValueError: PEFT has put LoRA on none of its linear layers.
    """
    layers = dict(_layers(model))
    if not layers:
        raise ValueError(
            f"apply_to: expected a model with PEFT's LoRA on linear layers, got a {type(model).__name__} without"
        )
    count = 0
    for name, layer in layers.items():
        if not _is_fused(layer):
            obstacle = _obstacle(name, layer)
            if obstacle is not None:
                forward.warn_once(obstacle)
                continue
            plain: Any = type(layer)  # mypy takes a Module's class for unhashable
            become(layer, subclass_with(plain, forward.fused(plain.forward)))
        count += 1
    for parent in model.modules():
        for names in groups.called_together(type(parent).forward):
            members = [child for name in names if (child := parent._modules.get(name)) and _is_fused(child)]
            if len(members) > 1:
                groups.join(members)
    return count


def unfuse_projections(model: torch.nn.Module) -> int:
    """Undoes :func:`fuse_projections`. Where it was not called, or undone already, nothing is done.

    Returns:
        The number of layers that ran fused.
    """
    layers = [layer for _, layer in _layers(model) if _is_fused(layer)]
    for layer in layers:
        groups.leave(layer)
        become(layer, type(layer).__bases__[0])
    return len(layers)


def _is_fused(layer: Any) -> bool:
    """True if the class of ``layer`` is one that :func:`fuse_projections` made."""
    return type(layer).__dict__.get("forward") in forward.made


def _classes() -> tuple[type[torch.nn.Module], ...]:
    """PEFT's classes of LoRA around a linear layer."""
    # A model can only have layers of a class whose module is imported: nothing else needs to be.
    modules = {name: sys.modules.get(f"peft.tuners.lora.{name}") for name in ("layer", "bnb")}
    named = (("layer", "Linear"), ("bnb", "Linear4bit"), ("bnb", "Linear8bitLt"))
    return tuple(getattr(modules[module], name) for module, name in named if hasattr(modules[module], name))


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The layers of ``model`` that PEFT's LoRA has wrapped around a linear one."""
    classes = _classes()
    return ((name, module) for name, module in model.named_modules() if isinstance(module, classes))


def _obstacle(name: str, layer: torch.nn.Module) -> str | None:
    """The reason why the forward of ``layer`` cannot be replaced, or None."""
    if "forward" in layer.__dict__:
        return f"something else replaced the forward of {name or type(layer).__name__} already"
    if type(layer).forward not in [cls.forward for cls in _classes()]:
        return f"{type(layer).__name__} has a forward of its own"
    return None
