"""Layers of a model made instances of a subclass with another forward, and made what they were."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

# accelerate's hooks put a function of their own under the first name, and the module's under the second.
_PLACES = ("forward", "_old_forward")
_fused_classes: set[Any] = set()


def replaced_forward(layer: torch.nn.Module) -> str | None:
    """The attribute of ``layer`` that holds another forward than its class's; None if nothing does."""
    place = _PLACES["_old_forward" in layer.__dict__]
    present = layer.__dict__.get(place)
    is_replaced = present is not None and getattr(present, "__func__", None) is not type(layer).forward
    return place if is_replaced else None


def has_hooks(module: Any) -> bool:
    """True if calling ``module`` runs more than its forward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        # Hooks on all modules: a profiler's, or a debugger's.
        or torch.nn.modules.module._has_any_global_hook()
    )


def plain_class(layer: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of ``layer`` before :func:`install`."""
    kind = type(layer)
    return kind.__bases__[0] if kind in _fused_classes else kind


def install(layer: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """Makes ``layer`` an instance of the subclass of its class that has this forward."""
    plain: Any = type(layer)  # mypy takes a Module's class for unhashable
    _become(layer, _fused_class(plain, forward))


def remove(fused: Sequence[tuple[str, torch.nn.Module]]) -> None:
    """Undoes :func:`install` on layers, given with their names.

    Raises:
        NotImplementedError: A layer's class was subclassed since then; the message names it. Nothing is changed.
    """
    for name, layer in fused:
        if "forward" not in vars(type(layer)):
            raise NotImplementedError(
                f"remove_from: {name or type(layer).__name__}: something else made it a {type(layer).__name__} after "
                "apply_to; undo that first; nothing was changed"
            )
    for _, layer in fused:
        _become(layer, type(layer).__bases__[0])


def _become(layer: torch.nn.Module, new: type[torch.nn.Module]) -> None:
    """Makes ``layer`` an instance of ``new``, and bound forwards of its old class those of ``new``."""
    old = type(layer)
    layer.__class__ = new
    for place in _PLACES:
        if getattr(layer.__dict__.get(place), "__func__", None) is not old.forward:
            continue
        if place == "forward":
            del layer.__dict__[place]  # the class has it
        else:
            layer.__dict__[place] = types.MethodType(new.forward, layer)


@functools.cache
def _fused_class(plain: Any, forward: Callable[..., Any]) -> type[torch.nn.Module]:
    """The subclass of ``plain`` that runs ``forward``; the same object for the same arguments.

    A class, because a method bound to one layer would run that layer's weights in its shallow copies, too.
    """

    def reduce(self: Any, _protocol: Any) -> tuple[Any, ...]:
        """A pickle is of the plain layer, in the form of protocol 0: that of 2 insists on the object's own class."""
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
    _fused_classes.add(fused)
    return fused
