"""Projections that read the same input, computed together at the first one's call.

A layer's forward calls its projections one after the other. The first call computes all of them, and the others take
what is theirs. Which ones belong together is read from the forward's source: those that it calls with one variable.
Whether they may is decided at each call: with the same tensor, unchanged, and with the same parameters.

What waits holds the graph of the whole step. After a call that fails halfway it waits until the next projection of any
group. That it waits no shorter is on purpose: a layer may let go of the first result before it asks for the others (an
activation between them, whose input a checkpoint does not keep), and a recomputation has to do what the forward did.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ...ops.lora_linear.api import project
from . import terms

# What siblings were computed with, and their results, by ``id`` of the module.
_Results = dict[int, tuple[tuple[object, ...], torch.Tensor]]


class _Group:
    """Modules that are called with one input, in the order of their calls, and the results that wait for theirs.

    Nothing of it is part of a module: copies of one are no siblings of these.
    """

    def __init__(self, members: list[torch.nn.Module]) -> None:
        self.members = [weakref.ref(member) for member in members]
        self.forget()

    def forget(self) -> None:
        self.source: Callable[[], torch.Tensor | None] = lambda: None
        self.version = 0
        self.results: _Results = {}

    def keep(self, x: torch.Tensor, results: _Results) -> None:
        """Lets the results for ``x`` wait."""
        self.source, self.version, self.results = weakref.ref(x), x._version, results

    def take(self, module: torch.nn.Module, x: torch.Tensor, key: tuple[object, ...]) -> torch.Tensor | None:
        """The result of ``module`` for ``x``, if it waits here."""
        if self.source() is not x or self.version != x._version:
            return None
        computed_with, y = self.results.pop(id(module), (None, None))
        if not self.results:
            self.forget()
        return y if computed_with == key else None


_groups: weakref.WeakKeyDictionary[torch.nn.Module, _Group] = weakref.WeakKeyDictionary()
# The one group that something may wait in.
_latest: weakref.WeakSet[_Group] = weakref.WeakSet()


def join(members: list[torch.nn.Module]) -> None:
    """Makes modules siblings, given in the order in which they are called. It tells only those that run fused."""
    group = _Group(members)
    for member in members:
        _groups[member] = group


def project_with_siblings(module: Any, x: torch.Tensor, own: terms.Terms) -> torch.Tensor:
    """The projection of ``x`` by ``module`` with its terms; its siblings' are computed with it, if it comes first.

    Args:
        module: A layer that :func:`terms.read` has read.
        x: ``[..., N_in]``.
        own: Its terms, with a weight.
    """
    group = _groups.get(module)
    # A recomputation draws masks in the order of the first computation, which may have run without gradients and so
    # each by itself.
    if group is None or own.has_dropout:
        return terms.project_alone(x, own)
    for other in _latest - {group}:
        other.forget()
        _latest.discard(other)
    _latest.add(group)
    waiting = group.take(module, x, _key(own, x))
    if waiting is not None:
        return waiting
    group.forget()
    read = {id(module): own}
    forward = type(module).forward
    if group.members[0]() is module:
        for member in group.members[1:]:
            sibling = member()
            # One that does not run fused would not take its result.
            if sibling is None or type(sibling).forward is not forward:
                continue
            its = terms.read(sibling, x)
            if isinstance(its, terms.Terms) and its.weight is not None and not its.has_dropout:
                read[id(sibling)] = its
    pairs = [pair._replace(projection=p) for p, its in enumerate(read.values()) for pair in its.pairs]
    biases = [bias._replace(projection=p) for p, its in enumerate(read.values()) for bias in its.biases]
    weights = [its.weight for its in read.values() if its.weight is not None]
    first, *others = project(x, weights, pairs, biases)
    if others:
        siblings = list(read.items())[1:]
        results = {at: (_key(its, x), y) for (at, its), y in zip(siblings, others, strict=True)}
        group.keep(x, results)
    return first


def _key(own: terms.Terms, x: torch.Tensor) -> tuple[object, ...]:
    """What a result depends on, beside the values of ``x``."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (*own.key(), autocast)


@functools.cache
def called_together(forward: Callable[..., Any]) -> list[list[str]]:
    """The names of the attributes of ``self`` that ``forward`` calls with one variable, in the order of their calls.

    A variable that is assigned in between is another one. None are found where the source cannot be read.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return []
    calls = _Calls()
    calls.visit(tree)
    return [names for names in calls.by_value.values() if len(names) > 1]


class _Calls(ast.NodeVisitor):
    """Calls like ``self.name(variable)`` in the order of their execution, by the value that the variable has."""

    def __init__(self) -> None:
        self._assignments: dict[str, int] = {}
        self.by_value: dict[tuple[str, int], list[str]] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._assignments[node.id] = self._assignments.get(node.id, 0) + 1

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="self"), attr=name),
                args=[ast.Name(id=variable)],
                keywords=[],
            ):
                names = self.by_value.setdefault((variable, self._assignments.get(variable, 0)), [])
                if name not in names:
                    names.append(name)
