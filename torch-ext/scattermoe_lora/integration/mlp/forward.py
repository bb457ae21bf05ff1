"""Gated MLPs run as one operator between their projections, safe in float16: installed in a model, and removed."""

from __future__ import annotations

import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...ops.activation import act
from ...ops.gated_activation.api import gated_activation, zero_if_infinite
from ...ops.gated_activation.limits import LARGEST
from .. import subclasses
from .layout import Layout, find_layout

_LOGGER = logging.getLogger(__name__)
# Gemma 4's audio tower has no gate, and clamps what its second projection returns itself.
_UNGATED = ("transformers.models.gemma4.modeling_gemma4", "Gemma4AudioFeedForward", "act_fn")
_forwards: set[Callable[..., Any]] = set()


def install(model: torch.nn.Module) -> int:
    """Runs every gated MLP of ``model`` through :func:`~scattermoe_lora.gated_activation`, safe in float16.

    An MLP is any module that computes ``down(act(gate(x)) * up(x))`` of two or three projections, whatever its class
    (found by trying); the projections run as they are, with LoRA, quantized, clipped or not. In float32 and bfloat16
    the results stay the same, on a CPU to the bit. In float16 the product is clamped, and what the last projection
    returns that is not finite becomes 0, so that the residual survives; in Gemma 4's audio MLPs, which have no gate, an
    infinite argument of the activation counts as the largest number.

    Calling it again does nothing. A line of the log says which MLPs run as they are, and why.

    Returns:
        The number of MLPs that run so.
    """
    count, kept = 0, Counter[str]()
    for layer, forward, reason in list(_layers(model)):
        if reason is None and forward is not None and not _is_installed(layer):
            subclasses.install(layer, forward)
        if reason is not None:
            kept[f"{type(layer).__name__} ({reason})"] += 1
        count += reason is None
    for what, number in kept.items():
        _LOGGER.info("mlp: %d of %s run as they are", number, what)
    return count


def remove(model: torch.nn.Module) -> int:
    """Undoes :func:`install`; the number of MLPs that it was done to.

    Raises:
        NotImplementedError: An MLP's class was subclassed since then; the message names it. Nothing is changed.
    """
    installed = [(name, module) for name, module in model.named_modules() if _is_installed(module)]
    subclasses.remove(installed)
    return len(installed)


def _is_installed(module: torch.nn.Module) -> bool:
    return type(module).forward in _forwards


def _layers(
    model: torch.nn.Module,
) -> Iterator[tuple[torch.nn.Module, Callable[..., Any] | None, str | None]]:
    """What may be MLPs: the module whose forward is replaced, the new one, and why it is not, if so."""
    modeling, name, attribute = _UNGATED
    ungated = getattr(sys.modules.get(modeling), name, None)
    for module in model.modules():
        if _is_installed(module):
            yield module, None, None
            continue
        layer, layout = module, find_layout(module)
        if ungated is not None and isinstance(module, ungated):
            layer = getattr(module, attribute)
            if _is_installed(layer):
                continue
        elif layout is None:
            continue
        plain: Any = type(layer)
        if (place := subclasses.replaced_forward(layer)) is not None:
            yield layer, None, f"something else replaced its {place}"
        elif isinstance(layout, str):
            yield layer, None, layout
        else:
            yield layer, _finite_forward(plain) if layout is None else _gated_forward(plain, layout), None


@functools.cache
def _gated_forward(plain: Any, layout: Layout) -> Callable[..., Any]:
    """The forward of a class with a layout; the same object for the same arguments."""

    # Its name is its place's: a pickled module then names the class's own forward.
    def forward(self: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        """As the class's forward."""
        if layout.act is not None and subclasses.has_hooks(getattr(self, layout.act)):
            result: torch.Tensor = plain.forward(self, *arguments, **named)
            return result
        (x,) = (*arguments, *named.values())
        gate = getattr(self, layout.gate)(x)
        up = gate if layout.up == layout.gate else getattr(self, layout.up)(x)
        gate, up = layout.split(gate, up)
        if _takes(gate, up):
            hidden = gated_activation(gate, up, layout.activation)
        else:
            hidden = act(layout.activation, gate) * up
        return zero_if_infinite(getattr(self, layout.down)(hidden))

    _forwards.add(forward)
    return forward


def _takes(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """True if the operator serves them: not tensors of a subclass (sharded ones), nor mixed dtypes, nor float64 on a
    GPU."""
    return (
        all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (gate, up))
        and (gate.dtype, gate.shape, gate.device) == (up.dtype, up.shape, up.device)
        and (gate.dtype != torch.float64 or gate.device.type == "cpu")
    )


@functools.cache
def _finite_forward(plain: Any) -> Callable[..., Any]:
    """The forward of a class of activations, of finite arguments in float16."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the class's forward."""
        result: torch.Tensor = plain.forward(
            self, x.clamp(-LARGEST, LARGEST) if x.dtype == torch.float16 else x
        )
        return result

    _forwards.add(forward)
    return forward
