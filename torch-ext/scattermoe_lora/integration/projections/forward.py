"""The forward of PEFT's LoRA layers around a linear layer, with every term added in place."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...ops.lora_linear.api import Pair
from ..fused_classes import is_plain, is_small
from . import groups, terms

_warned: set[str] = set()


@functools.cache
def fused(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward that computes what ``plain``, PEFT's for some class of layers, does; the same object for the same."""

    # Its name is its place's: a pickled model then names the class's own forward.
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's, of 0.21."""
        if args or kwargs:
            if kwargs.get("adapter_names") is not None:
                warn_once("each sample of the batch has an adapter of its own")
            return plain(self, x, *args, **kwargs)
        own = terms.read(self, x)
        if not isinstance(own, terms.Terms):
            if own is not None:
                warn_once(own)
            return plain(self, x)
        # A forward without gradients may be a checkpoint's, whose recomputation draws the same masks.
        if is_small(x) and not own.has_dropout:
            return plain(self, x)
        if own.weight is None:
            return _around(self.base_layer, x, own)
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and own.needs_gradient(x)):
            return terms.project_alone(x, own)
        return groups.project_with_siblings(self, x, own)

    return forward


def _around(base: torch.nn.Module, x: torch.Tensor, own: terms.Terms) -> torch.Tensor:
    """What the base layer, of any kind, computes of ``x``, with the terms added to its result."""
    rows = x.reshape(-1, x.shape[-1])
    # As rows: of a result with more dimensions these would be a view, whose gradient a sum in place copies. Another
    # layer, or a hook on it, may keep what it is given and returns.
    is_fresh = type(base) in _fresh_classes() and is_plain(base)
    y = base(rows if is_fresh else x)
    y = y.reshape(-1, y.shape[-1])
    # A view lets nobody write to it, or is of what was saved.
    in_place = is_fresh and not y._is_view()
    for low, b in _low_rank(rows, own.pairs, y.dtype):
        y = y.addmm_(low, b) if in_place else torch.addmm(y, low, b)
        in_place = True
    for bias in own.biases:
        y = y + bias.value.to(y.dtype) * bias.scaling
    return y.view(*x.shape[:-1], y.shape[-1])


def _fresh_classes() -> tuple[type[torch.nn.Module], ...]:
    """Classes of linear layers that return a tensor which they have just made and do not keep."""
    named = (
        ("bitsandbytes.nn", "Linear4bit"),
        ("bitsandbytes.nn", "Linear8bitLt"),
        ("transformers.integrations.finegrained_fp8", "FP8Linear"),
    )
    modules = ((sys.modules.get(module), name) for module, name in named)
    return (torch.nn.Linear, *(getattr(module, name) for module, name in modules if hasattr(module, name)))


def _low_rank(
    rows: torch.Tensor, pairs: list[Pair], dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``dropout(x) A^T`` and ``s B^T`` in ``dtype``, ``[T, r]`` and ``[r, N_out]``: at once without
    dropout."""
    scaled = [(pair.b * pair.scaling).to(dtype) for pair in pairs]
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(dtype)
        if any(pair.dropout for pair in pairs):
            for pair, b in zip(pairs, scaled, strict=True):
                yield torch.nn.functional.dropout(rows, pair.dropout) @ pair.a.to(dtype).t(), b.t()
        else:
            a = torch.cat([pair.a.to(dtype) for pair in pairs])
            yield rows @ a.t(), torch.cat(scaled, dim=1).t()


def warn_once(reason: str) -> None:
    """Tells, the first time that it is the reason, why a projection runs through PEFT's own forward."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"scattermoe: a projection runs through PEFT's own forward, not fused: {reason}", stacklevel=3
        )
