"""Keys and values that later layers share, held by the graph of those that read them and by nothing else.

A model that shares them hands all its layers one dictionary. Under checkpointing that closes a circle: the dictionary
holds the keys, they hold the graph of the layer that made them, that graph holds what its checkpoint needs to run
again, and among those arguments is the dictionary. It passes through C++, so Python's garbage collector does not see
it: only a backward through the whole graph opens it. A step without one (a loss that is only looked at, or skipped for
being NaN) leaks its keys and values.

Here the dictionary forgets them once the last layer has read them, and each reader's graph keeps them until its
backward is done.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import MutableMapping
from typing import Any

import torch


class _Pair(list[torch.Tensor]):
    """``[key, value]`` as a layer stored them. A list's subclass, because a tuple takes no weak reference."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__((key, value))
        self.recorded = torch.is_grad_enabled()


class _Forgotten:
    """The dictionary's entry for a pair that only graphs still need."""

    def __init__(self, pair: _Pair) -> None:
        self.pair = weakref.ref(pair)


class _Keep(torch.autograd.Function):
    """The identity, with a node that saves its input."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query)
        return query.view_as(query)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def store(shared: MutableMapping[str, Any], layer_type: str, key: torch.Tensor, value: torch.Tensor) -> None:
    """Puts the states where the layers after it read them.

    In a checkpoint's second run, when all readers have read, there is nothing to do.
    """
    if not isinstance(shared.get(layer_type), _Forgotten):
        shared[layer_type] = _Pair(key, value)


def read(
    shared: MutableMapping[str, Any], layer_type: str, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(query, key, value)``: the states, and the query of the layer that reads them with a graph that keeps them."""
    entry = shared[layer_type]
    pair: Any = entry.pair() if isinstance(entry, _Forgotten) else entry
    if pair is None:
        raise RuntimeError(
            "the keys and values that this layer shares are gone: the graph that held them was run backward already; "
            "pass retain_graph=True the first time"
        )
    if isinstance(pair, _Pair) and query.requires_grad and not pair.recorded:
        # So it is without this module, too, and only who chose the checkpointing can mend it.
        warnings.warn(
            "Reentrant gradient checkpointing loses the gradient that layers with shared keys and values send back to "
            "the layer that computed them. Use gradient_checkpointing_kwargs={'use_reentrant': False}.",
            stacklevel=2,
        )
    if isinstance(pair, _Pair) and query.requires_grad and pair[0].requires_grad:
        # A checkpoint drops what is saved and computes it again, unless inner hooks say what to save: here, the pair in
        # the place of the query. As anything saved it lives while the graph can be run backward, and no longer.
        with torch.autograd.graph.saved_tensors_hooks(lambda _: pair, lambda kept: kept[0]):
            query = _Keep.apply(query)
    key, value = pair
    return query, key, value


def forget(shared: MutableMapping[str, Any], layer_type: str) -> None:
    """Leaves what :func:`store` put there to the graphs that need it; for the last layer that reads it.

    States without a graph, and those that someone else put there, stay.
    """
    entry = shared.get(layer_type)
    if isinstance(entry, _Pair) and entry[0].requires_grad:
        shared[layer_type] = _Forgotten(entry)
