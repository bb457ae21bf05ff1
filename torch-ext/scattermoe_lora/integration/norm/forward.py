"""RMSNorms of a model as one operator each."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...ops.rms_norm.api import rms_norm
from .. import trying
from ..fused_classes import Part, Target, is_small, plain_class, replaced_forward
from .formula import Formula, find_formula

_LOGGER = logging.getLogger(__name__)
_forwards: set[Callable[..., Any]] = set()


def _targets(model: torch.nn.Module, _named: bool) -> Iterator[Target]:
    kept = Counter[str]()
    for name, module in trying.candidates(model):
        forward: Any = type(module).forward
        if forward in _forwards:
            yield Target(name, module, plain_class(module), forward)
            continue
        formula = find_formula(module)
        if formula is None:
            continue
        place = replaced_forward(module)
        if place is not None or isinstance(formula, str):
            reason = formula if place is None else f"something else replaced its {place}"
            kept[f"{type(module).__name__} ({reason})"] += 1
            continue
        plain: Any = type(module)
        yield Target(name, module, plain, _forward(plain, formula))
    for what, number in kept.items():
        _LOGGER.info("norm: %d of %s run as they are", number, what)


PART = Part("norm", "RMSNorms", _targets)
"""Every RMSNorm, as :func:`~scattermoe_lora.rms_norm`.

A norm is any module that computes ``x / rms(x)``, times its ``weight`` or one more than it or nothing, and rounds as
Gemma's norms or as Llama's, whatever its class (found by trying). The results stay the same, on a CPU to the bit. Small
calls without gradients are the class's own, which is faster then. A line of the log says which norms run as they are,
and why.
"""


@functools.cache
def _forward(plain: Any, formula: Formula) -> Callable[..., Any]:
    """The forward of a class with a formula; the same object for the same arguments."""

    # Its name is its place's: a pickled module then names the class's own forward.
    def forward(self: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        """As the class's forward."""
        x, *others = (*arguments, *named.values())
        if others:
            # A gate, in classes that take one.
            gated: torch.Tensor = plain.forward(self, *arguments, **named)
            return gated
        weight = self.weight if formula.weighted else None
        if _takes(x, weight) and not is_small(x):
            return rms_norm(
                x, weight, getattr(self, formula.eps), offset=formula.offset, round_first=formula.round_first
            )
        result: torch.Tensor = plain.forward(self, x)
        return result

    _forwards.add(forward)
    return forward


def _takes(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """True if the operator serves them as the class does: not tensors of a subclass (sharded ones), nor float64."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    tensors = (x,) if weight is None else (x, weight)
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.dtype in floats for t in tensors) and (
        weight is None or (weight.shape == x.shape[-1:] and weight.device == x.device)
    )
