"""Wrappers around other libraries' functions, stacked by several builds of this package, each of which can leave."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, make: Callable[[list[Callable[..., Any]]], Callable[..., Any]]) -> Any:
    """Replaces ``owner.name`` and returns what now stands there, for :func:`unwrap`.

    Args:
        owner: A class or a module.
        name: Of its function.
        make: Makes the new function from a list that holds the old one. A list, so that another build, which came
            before and leaves first, can take itself out of the chain.
    """
    inner = [getattr(owner, name)]
    outer: Any = functools.wraps(inner[0])(make(inner))
    outer.scattermoe_inner = inner
    setattr(owner, name, outer)
    return outer


def unwrap(owner: Any, name: str, wrapper: Any) -> None:
    """Takes ``wrapper`` out of the chain of those that builds put around the function.

    One that is not a build's stays around it: a wrapper has to pass everything on once nothing is registered any more.
    """
    outer = getattr(owner, name)
    if outer is wrapper:
        setattr(owner, name, wrapper.scattermoe_inner[0])
        return
    while hasattr(outer, "scattermoe_inner"):
        if outer.scattermoe_inner[0] is wrapper:
            outer.scattermoe_inner[0] = wrapper.scattermoe_inner[0]
            return
        outer = outer.scattermoe_inner[0]
