"""RMSNorms run as one operator each: installed in a model, and removed."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ...ops.rms_norm.api import rms_norm
from .. import subclasses
from .formula import Formula, find_formula

_LOGGER = logging.getLogger(__name__)
_forwards: set[Callable[..., Any]] = set()


def install(model: torch.nn.Module) -> int:
    """Runs every RMSNorm of ``model`` as :func:`~scattermoe_lora.rms_norm`.

    A norm is any module that computes ``x / rms(x)``, with its ``weight`` or none, or one added to it, and rounds as
    Gemma's norms or as Llama's, whatever its class (found by trying). The results stay the same, on a CPU to the bit.

    Calling it again does nothing. A line of the log says which norms run as they are, and why.

    Returns:
        The number of norms that run so.
    """
    count, kept = 0, Counter[str]()
    for module in model.modules():
        if _is_installed(module):
            count += 1
            continue
        formula = find_formula(module)
        if formula is None:
            continue
        place = subclasses.replaced_forward(module)
        if place is not None or isinstance(formula, str):
            reason = formula if place is None else f"something else replaced its {place}"
            kept[f"{type(module).__name__} ({reason})"] += 1
            continue
        plain: Any = type(module)
        subclasses.install(module, _forward(plain, formula))
        count += 1
    for what, number in kept.items():
        _LOGGER.info("norm: %d of %s run as they are", number, what)
    return count


def remove(model: torch.nn.Module) -> int:
    """Undoes :func:`install`; the number of norms that it was done to.

    Raises:
        NotImplementedError: A norm's class was subclassed since then; the message names it. Nothing is changed.
    """
    installed = [(name, module) for name, module in model.named_modules() if _is_installed(module)]
    subclasses.remove(installed)
    return len(installed)


def _is_installed(module: torch.nn.Module) -> bool:
    return type(module).forward in _forwards


@functools.cache
def _forward(plain: Any, formula: Formula) -> Callable[..., Any]:
    """The forward of a class with a formula; the same object for the same arguments."""

    # Its name is its place's: a pickled module then names the class's own forward.
    def forward(self: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        """As the class's forward."""
        (x,) = (*arguments, *named.values())
        weight = self.weight if formula.weighted else None
        if _takes(x, weight):
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
