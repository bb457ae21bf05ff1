"""Comparison of two variants' public APIs: within a version what ``__all__`` holds may grow, and never break."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import griffe

from kernelpress.api.public_api import PACKAGE, definition, final, load_api, location, public_names
from kernelpress.api.signatures import labels, overloads, signature

# Modules within modules that are public.
_NESTED = 5


@dataclass(frozen=True)
class ApiChange:
    """One difference of the public API.

    ``name`` is dotted below the package; ``path`` and ``line`` are in the newer of the two that has it.
    """

    effect: Literal["breaks", "adds"]
    name: str
    what: str
    path: str = ""
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def compare(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> tuple[ApiChange, ...]:
    """List what changed of the public API from one variant to another.

    Args:
        old: The files of a published variant by their paths in it.
        new: The files of a variant that is to be published.

    Returns:
        Breaks first, then additions. Upstream's rule: a break needs a new version; an addition to a kernel
        without compiled parts needs none.

    Raises:
        CheckError: One of them holds no package.
    """
    changes = _changes(load_api(old), load_api(new))
    return tuple(sorted(changes, key=lambda change: (change.effect != "breaks", change.name, change.what)))


def _changes(old: griffe.Module, new: griffe.Module, within: str = "") -> Iterator[ApiChange]:
    """Differences of two forms of the package, or of a module of it; ``within`` is its name and a dot."""
    before, after = public_names(old), public_names(new)
    file, _ = location(new)
    for name in before:
        shown = within + name
        if name not in after:
            lost = "removed from __all__" if old.exports is not None else "removed"
            yield ApiChange("breaks", shown, lost, file if within else "")
            continue
        was, now = definition(old, name), definition(new, name)
        if was is not None and now is not None:
            yield from _between(shown, was, now)
            continue
        outside = _outside(new, name)
        if outside is not None and outside != _outside(old, name):
            yield ApiChange(
                "breaks", shown, f"is now taken from {outside}, where nothing can be compared", file
            )
        elif outside is None and now is None and _is_bound(old, name) and not _is_bound(new, name):
            yield ApiChange("breaks", shown, "still in __all__ and no longer defined", file)
    for name in after:
        if name not in before:
            added = definition(new, name)
            yield ApiChange("adds", within + name, "new", *(location(added) if added is not None else ()))


def _outside(module: griffe.Module, name: str) -> str | None:
    """The full name of the object that a public name is taken from, if that is outside of the package."""
    member = module.members.get(name)
    try:
        if isinstance(member, griffe.Alias):
            member.resolve_target()
    except griffe.AliasResolutionError as error:
        path = error.alias.target_path
        return None if path.partition(".")[0] == PACKAGE else path
    except griffe.CyclicAliasError:
        pass
    return None


def _is_bound(module: griffe.Module, name: str) -> bool:
    """Return whether a name is bound, as far as the source shows."""
    stars = any(isinstance(member, griffe.Alias) and member.wildcard for member in module.members.values())
    return name in module.members or "__getattr__" in module.members or stars


def _between(name: str, old: griffe.Object, new: griffe.Object) -> Iterator[ApiChange]:
    """Differences of what one public name stands for."""
    place = location(new)
    if isinstance(old, griffe.Module) and isinstance(new, griffe.Module):
        # Upstream's convention for layers: `from . import layers`. What a module imports of itself ends there.
        if name.count(".") < _NESTED:
            yield from _changes(old, new, f"{name}.")
    elif old.kind is not new.kind:
        yield ApiChange("breaks", name, f"was {_a(old)} and is now {_a(new)}", *place)
    elif isinstance(old, griffe.Function) and isinstance(new, griffe.Function):
        for difference in (*labels(old, new), *overloads(old, new), *signature(old, new)):
            yield ApiChange("breaks", name, difference, *place)
        names = {parameter.name for parameter in old.parameters}
        for parameter in new.parameters:
            if parameter.name not in names and not parameter.required:
                yield ApiChange("adds", name, f"optional parameter {parameter.name!r} added", *place)
    elif isinstance(old, griffe.Class) and isinstance(new, griffe.Class):
        yield from _members(name, old, new)
    elif isinstance(old, griffe.Attribute) and isinstance(new, griffe.Attribute):
        for difference in labels(old, new):
            yield ApiChange("breaks", name, difference, *place)
        if old.annotation is not None and str(old.annotation) != str(new.annotation):
            yield ApiChange("breaks", name, f"type changed from {old.annotation} to {new.annotation}", *place)


def _a(member: griffe.Object) -> str:
    return f"{'an' if member.kind.value.startswith('a') else 'a'} {member.kind.value}"


def _members(name: str, old: griffe.Class, new: griffe.Class) -> Iterator[ApiChange]:
    place = location(new)
    for base in old.bases:
        if str(base) not in map(str, new.bases):
            yield ApiChange("breaks", name, f"no longer derives from {base}", *place)
    for member, inherited in old.all_members.items():
        before = final(inherited)
        if before is None:
            continue
        if member.startswith("_") and member not in ("__init__", "__call__"):
            # What an operator or a built-in function calls; its parameters are never named.
            called = isinstance(before, griffe.Function) and member.endswith("__")
            if called and not hasattr(object, member) and member not in new.all_members:
                yield ApiChange("breaks", f"{name}.{member}", "removed", *place)
            continue
        if member not in new.all_members:
            yield ApiChange("breaks", f"{name}.{member}", "removed", *place)
        elif (after := final(new.all_members[member])) is not None:
            yield from _between(f"{name}.{member}", before, after)
    for member in new.members:
        if not member.startswith("_") and member not in old.all_members:
            yield ApiChange("adds", f"{name}.{member}", "new", *place)
