"""Modules of a model that run another forward: as instances of a subclass of theirs, and back."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

# accelerate's hooks put a function of their own under the first name, and the module's under the second.
_PLACES = ("forward", "_old_forward")

Forward = Callable[..., Any]
_fused_classes: set[Any] = set()
# Elements of an input from which an operator saves more than a call of it costs, 0.1 ms in Python.
_SMALL = 1 << 18


class Target(NamedTuple):
    """A module of a model that can run fused.

    Attributes:
        name: The module's in the model; empty for the model itself.
        module: The module.
        base: The class that defines the forward which the fused one stands for.
        forward: The fused forward, the same object for all modules of that base.
        parameters: What the base's forward has to take; None for anything.
    """

    name: str
    module: torch.nn.Module
    base: type[torch.nn.Module]
    forward: Forward
    parameters: list[str] | None = None

    @property
    def is_fused(self) -> bool:
        """True if the module's class runs the fused forward."""
        return type(self.module).forward is self.forward

    def check(self) -> None:
        """Refuse a module that runs another forward than its class's, or whose class's is not that of ``base`` or ours.

        One that runs fused already may be wrapped since then.

        Raises:
            NotImplementedError: It does.
        """
        place = None if self.is_fused or self._is_wrapped() else replaced_forward(self.module)
        own = type(self.module)
        signature = inspect.signature(self.base.forward)
        if self.parameters is not None and list(signature.parameters) != self.parameters:
            self.refuse(f"this transformers' {self.base.__name__}.forward takes {signature}")
        if not self.is_fused and own.forward is not self.base.forward:
            self.refuse(f"{own.__name__} overrides the forward of {self.base.__name__}")
        if place is not None:
            self.refuse(f"something else replaced its {place} already; undo that, or call apply_to before it")

    def refuse(self, reason: str) -> None:
        """Raises NotImplementedError that names the module and says why."""
        name = self.name or type(self.module).__name__
        raise NotImplementedError(f"apply_to: {name}: {reason}; nothing was changed")

    def fuse(self) -> None:
        """Makes the module run fused. Where it does already, nothing is done."""
        if not self.is_fused:
            plain: Any = type(self.module)  # mypy takes a Module's class for unhashable
            _become(self.module, _fused_class(plain, self.forward))

    def check_removable(self) -> None:
        """Refuse a fused module whose class was subclassed since then, or whose forward was replaced.

        Raises:
            NotImplementedError: It was.
        """
        reason, place = None, replaced_forward(self.module)
        if "forward" not in vars(type(self.module)):
            reason = f"something else made it a {type(self.module).__name__} after apply_to"
        elif place is not None and not self._is_wrapped():
            reason = f"something else replaced its {place} after apply_to"
        if reason is not None:
            name = self.name or type(self.module).__name__
            raise NotImplementedError(f"remove_from: {name}: {reason}; undo that first; nothing was changed")

    def _is_wrapped(self) -> bool:
        """True if the module's forward wraps a fused one that runs the class's own once that is back."""
        function: Any = self.module.__dict__.get("forward")
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        return function is self.forward and hasattr(function, "scattermoe_fused")

    def restore(self) -> None:
        """Undoes :meth:`fuse`."""
        _become(self.module, type(self.module).__bases__[0])


class Part(NamedTuple):
    """A part of a model that can run fused, as ``apply_to`` names it.

    Attributes:
        name: What users call it.
        needs: What a model must have, as in "expected a model with ...".
        targets: Yields the modules of a model that this part is about. Its second argument tells whether the part was
            asked for by name: what it cannot serve it then refuses with NotImplementedError, and else leaves out.
    """

    name: str
    needs: str
    targets: Callable[[torch.nn.Module, bool], Iterator[Target]]


def replaced_forward(module: torch.nn.Module) -> str | None:
    """The attribute of ``module`` that holds another forward than its class's; None if nothing does."""
    place = _PLACES["_old_forward" in module.__dict__]
    present = module.__dict__.get(place)
    is_replaced = present is not None and getattr(present, "__func__", None) is not type(module).forward
    return place if is_replaced else None


def plain_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of ``module`` before it ran fused."""
    kind = type(module)
    return kind.__bases__[0] if kind in _fused_classes else kind


def has_hooks(module: Any) -> bool:
    """True if calling ``module`` runs more than its forward."""
    # Hooks on all modules: a profiler's, or a debugger's.
    return _has_own_hooks(module) or torch.nn.modules.module._has_any_global_hook()


def is_small(x: torch.Tensor) -> bool:
    """True where a class's own formula computes ``x`` faster than an operator: decoding a token at a time, for one.

    Without gradients alone: with them an operator saves memory, too. In compiled code a call of one costs nothing.
    """
    return x.numel() < _SMALL and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_plain(module: torch.nn.Module) -> bool:
    """True if ``module`` has no hooks of its own, and no other forward than its class's."""
    return "forward" not in module.__dict__ and not _has_own_hooks(module)


def _has_own_hooks(module: Any) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def _become(module: torch.nn.Module, new: type[torch.nn.Module]) -> None:
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
def _fused_class(plain: Any, forward: Forward) -> type[torch.nn.Module]:
    """The subclass of ``plain`` that runs ``forward``; the same object for the same arguments.

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

    # transformers and PEFT go by a class's name and module: for the loss of a class, for what config.json says.
    members = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"forward": forward, "__reduce_ex__": reduce}
    # Both would go by the pickle otherwise. A class that has its own has a reason.
    if not hasattr(plain, "__copy__"):
        members["__copy__"] = shallow
    fused: type[torch.nn.Module] = type(plain.__name__, (plain,), members)
    if not hasattr(plain, "__deepcopy__"):
        # Not as a method, which copy.deepcopy asks the instance for: a wrapper that hands attributes on would be taken
        # for what it wraps.
        copy._deepcopy_dispatch[fused] = deep  # type: ignore[attr-defined]
    _fused_classes.add(fused)
    return fused
