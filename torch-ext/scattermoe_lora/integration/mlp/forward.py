"""Gated MLPs of a model as one operator between their projections, safe in float16."""

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
from .. import trying
from ..fused_classes import Part, Target, has_hooks, is_small, plain_class, replaced_forward
from .layout import Layout, find_layout

_LOGGER = logging.getLogger(__name__)
# Gemma 4's audio tower has no gate, and clamps what its second projection returns itself.
_UNGATED = ("transformers.models.gemma4.modeling_gemma4", "Gemma4AudioFeedForward", "act_fn")
_forwards: set[Callable[..., Any]] = set()


def _targets(model: torch.nn.Module, _named: bool) -> Iterator[Target]:
    modeling, class_name, attribute = _UNGATED
    ungated = getattr(sys.modules.get(modeling), class_name, None)
    kept = Counter[str]()
    for name, module in trying.candidates(model):
        forward: Any = type(module).forward
        if forward in _forwards:
            yield Target(name, module, plain_class(module), forward)
            continue
        layout = find_layout(module)
        if ungated is not None and isinstance(module, ungated):
            name, module = f"{name}.{attribute}", getattr(module, attribute)
            if type(module).forward in _forwards:
                continue
        elif layout is None:
            continue
        place = replaced_forward(module)
        if place is not None or isinstance(layout, str):
            reason = layout if place is None else f"something else replaced its {place}"
            kept[f"{type(module).__name__} ({reason})"] += 1
            continue
        plain: Any = type(module)
        yield Target(
            name, module, plain, _finite_forward(plain) if layout is None else _gated_forward(plain, layout)
        )
    for what, number in kept.items():
        _LOGGER.info("mlp: %d of %s run as they are", number, what)


PART = Part("mlp", "gated MLPs, down(act(gate(x)) * up(x))", _targets)
"""Every gated MLP, through :func:`~scattermoe_lora.gated_activation`, safe in float16.

An MLP is any module that computes ``down(act(gate(x)) * up(x))`` of two or three projections, whatever its class (found
by trying); the projections run as they are, with LoRA, quantized, clipped or not. In float32 and bfloat16 the results
stay the same, on a CPU to the bit. In float16 the product is clamped, and what the last projection returns that is not
finite becomes 0, so that the residual survives; in Gemma 4's audio MLPs, which have no gate, an infinite argument of
the activation counts as the largest number. A line of the log says which MLPs run as they are, and why.
"""


@functools.cache
def _gated_forward(plain: Any, layout: Layout) -> Callable[..., Any]:
    """The forward of a class with a layout; the same object for the same arguments."""

    # Its name is its place's: a pickled module then names the class's own forward.
    def forward(self: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        """As the class's forward."""
        is_hooked = layout.act is not None and has_hooks(getattr(self, layout.act))
        if is_hooked or len(arguments) + len(named) != 1:
            result: torch.Tensor = plain.forward(self, *arguments, **named)
            return result
        (x,) = (*arguments, *named.values())
        gate = getattr(self, layout.gate)(x)
        up = gate if layout.up == layout.gate else getattr(self, layout.up)(x)
        gate, up = layout.split(gate, up)
        # The formula rounds in the same places, but in float16.
        if _takes(gate, up) and (gate.dtype == torch.float16 or not is_small(gate)):
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
