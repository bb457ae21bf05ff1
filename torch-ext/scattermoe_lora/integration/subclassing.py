"""Another forward for one module, by a subclass of its class: part of its copies, and not of its pickles."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch

# accelerate's hooks put a function of their own under the first name, and the module's under the second.
_PLACES = ("forward", "_old_forward")


def become(module: torch.nn.Module, new: type[torch.nn.Module]) -> None:
    """Makes ``module`` an instance of ``new``, and bound forwards of its old class those of ``new``."""
    old = type(module)
    module.__class__ = new
    for place in _PLACES:
        if getattr(module.__dict__.get(place), "__func__", None) is not old.forward:
            continue
        if place == "forward":
            del module.__dict__[place]  # the class has it
        else:
            module.__dict__[place] = types.MethodType(new.forward, module)


@functools.cache
def subclass_with(plain: Any, forward: Callable[..., Any]) -> type[torch.nn.Module]:
    """The subclass of ``plain`` with this forward; the same object for the same arguments.

    A class, because a method bound to one module would run that module's weights in its shallow copies, too.
    """

    def reduce(self: Any, _protocol: Any) -> tuple[Any, ...]:
        """A pickle is of the plain module, in the form of protocol 0: that of 2 insists on the object's own class."""
        constructor, arguments, *rest = plain.__reduce_ex__(self, 0)
        return (constructor, tuple(plain if value is fused else value for value in arguments), *rest)

    def shallow(self: Any) -> Any:
        twin = self.__new__(type(self))
        twin.__setstate__(self.__dict__)
        return twin

    def deep(self: Any, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": __name__}
    # Both would go by the pickle otherwise. A class that has its own has a reason.
    for name, copier in (("__copy__", shallow), ("__deepcopy__", deep)):
        if not hasattr(plain, name):
            members[name] = copier
    fused: type[torch.nn.Module] = type(f"Fused{plain.__name__}", (plain,), members)
    return fused


def is_plain(module: torch.nn.Module) -> bool:
    """True if calling ``module`` runs its class's forward and nothing else: it has no hooks and no other forward."""
    return (
        "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
    )
