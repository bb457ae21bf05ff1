"""The contract of a version: what ``__all__`` holds may grow within a version, and never break."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import griffe

from kernelpress.build_model import Build
from kernelpress.conventions import UNIVERSAL, VARIANT_PREFIX
from kernelpress.errors import CheckError
from kernelpress.signatures import labels, overloads, signature

_PACKAGE = "kernel"
_INIT = "__init__.py"
# Imports from module to module that are followed for one name.
_REDIRECTS = 20
# Modules within modules that are public.
_NESTED = 5

Effect = Literal["breaks", "adds"]


@dataclass(frozen=True)
class ApiChange:
    """One difference of the public API. ``name`` is dotted below the package, ``path`` and ``line`` are in
    the newer of the two that has it."""

    effect: Effect
    name: str
    what: str
    path: str = ""
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def compare(old: Mapping[str, bytes] | Path, new: Build) -> tuple[ApiChange, ...]:
    """What changed of the public API from a published build to a new one.

    Args:
        old: The files of one published variant by their paths in it, flat or nested in the package's name; or
            the directory of a variant or of a whole build.
        new: The build to compare with.

    Returns:
        Breaks first, then additions. Upstream's rule: a break needs a new version; an addition to a kernel
        without compiled parts needs none.

    Raises:
        CheckError: ``old`` holds no package.
    """
    flat = next(each for each in new.variants if each.name != VARIANT_PREFIX + UNIVERSAL)
    return compare_files(
        _read(old) if isinstance(old, Path) else old, {file.path: file.data for file in flat.files}
    )


def compare_files(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> tuple[ApiChange, ...]:
    """The same for the files of two variants.

    Raises:
        CheckError: One of them holds no package.
    """
    with tempfile.TemporaryDirectory(prefix="kernelpress-api-") as scratch:
        before, after = (_load(files, Path(scratch, where)) for where, files in (("old", old), ("new", new)))
        changes = list(_changes(before, after, Path(scratch).resolve()))
    return tuple(sorted(changes, key=lambda change: (change.effect != "breaks", change.name, change.what)))


def _read(directory: Path) -> dict[str, bytes]:
    variants = sorted(path for path in directory.glob(f"{VARIANT_PREFIX}*") if path.is_dir())
    root = variants[0] if variants else directory
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.py"))}


def _load(files: Mapping[str, bytes], root: Path) -> griffe.Module:
    tops = [PurePosixPath(path).parent for path in files if PurePosixPath(path).name == _INIT]
    if not tops:
        raise CheckError("what is published holds no Python package, so there is no API to compare with")
    top = min(tops, key=lambda path: len(path.parts))
    for name, data in files.items():
        path = PurePosixPath(name)
        if path.suffix in (".py", ".pyi") and path.is_relative_to(top):
            target = root / _PACKAGE / path.relative_to(top)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    loaded = griffe.load(_PACKAGE, search_paths=[root], allow_inspection=False, resolve_aliases=True)
    assert isinstance(loaded, griffe.Module)
    return loaded


def _changes(old: griffe.Module, new: griffe.Module, scratch: Path, within: str = "") -> Iterator[ApiChange]:
    """What changed between two forms of the package, or of a module of it; ``within`` is its name and a dot."""
    names, now = _public(old), _public(new)
    home = _place(new, scratch)[0] or _INIT
    for name in names:
        shown = within + name
        if name not in now:
            lost = "removed from __all__" if old.exports is not None else "removed"
            yield ApiChange("breaks", shown, lost, home if within else "")
            continue
        before, after = _target(old, name), _target(new, name)
        if before is not None and after is not None:
            yield from _between(shown, before, after, scratch)
            continue
        outside = _outside(new, name)
        if outside is not None and outside != _outside(old, name):
            yield ApiChange(
                "breaks", shown, f"is now taken from {outside}, where nothing can be compared", home
            )
        elif outside is None and after is None and _defined(old, name) and not _defined(new, name):
            yield ApiChange("breaks", shown, "still in __all__ and no longer defined", home)
    for name in now:
        if name not in names:
            added = _target(new, name)
            place = _place(added, scratch) if added is not None else ()
            yield ApiChange("adds", within + name, "new", *place)


def _public(module: griffe.Module) -> list[str]:
    if module.exports is not None:
        listed = [str(each) for each in module.exports]
        for change, names in _later(module):
            listed = [each for each in listed if each not in names] + (names if change == "adds" else [])
        return listed
    return [name for name, member in module.members.items() if member.is_public and not member.is_module]


def _later(module: griffe.Module) -> Iterator[tuple[Effect | Literal["removes"], list[str]]]:
    """Calls of ``append``, ``extend`` and ``remove`` on ``__all__``, of which Griffe knows nothing."""
    for node in ast.parse(module.source).body:
        call = node.value if isinstance(node, ast.Expr) else None
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and isinstance(call.func.value, ast.Name)
            and call.func.value.id == "__all__"
            and call.args
        ):
            names = [
                each.value
                for argument in call.args
                for each in ast.walk(argument)
                if isinstance(each, ast.Constant) and isinstance(each.value, str)
            ]
            if call.func.attr in ("append", "extend", "insert"):
                yield "adds", names
            elif call.func.attr == "remove":
                yield "removes", names


def _outside(module: griffe.Module, name: str) -> str | None:
    """The full name of what a public name is taken from, if that is outside of the package."""
    member = module.members.get(name)
    for _ in range(_REDIRECTS):
        if not isinstance(member, griffe.Alias):
            return None
        path = member.target_path
        if path.partition(".")[0] != _PACKAGE:
            return path
        try:
            member = module.modules_collection[path]
        except KeyError:
            return None
    return None


def _defined(module: griffe.Module, name: str) -> bool:
    """Whether a name is bound, as far as the source shows."""
    stars = any(member.is_alias and member.wildcard for member in module.members.values())  # type: ignore[union-attr]
    return name in module.members or "__getattr__" in module.members or stars


def _target(module: griffe.Module, name: str) -> griffe.Object | None:
    """What a public name stands for; nothing where it comes from outside of the package."""
    member: griffe.Object | griffe.Alias | None = module.members.get(name)
    if isinstance(member, griffe.Module) and name in module.imports:
        # `from .twice import twice`: to Python the function hides the module, to griffe it is the other way.
        member = module.modules_collection.members[_PACKAGE]
        for part in module.imports[name].split(".")[1:]:
            member = member.members.get(part) if member is not None else None
    return None if member is None else _final(member)


def _final(member: griffe.Object | griffe.Alias) -> griffe.Object | None:
    """A member itself where it was imported, inherited or assigned (``f = g``); nothing where it comes from outside
    of the package."""
    for _ in range(_REDIRECTS):
        if isinstance(member, griffe.Alias):
            try:
                member = member.final_target
            except (griffe.AliasResolutionError, griffe.CyclicAliasError):
                return None
        value = member.value if isinstance(member, griffe.Attribute) else None
        if not isinstance(value, griffe.ExprName | griffe.ExprAttribute):
            break
        try:
            assigned = member.modules_collection[value.canonical_path]
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            break
        if assigned.is_module:
            break
        member = assigned
    return None if isinstance(member, griffe.Alias) else member


def _between(name: str, old: griffe.Object, new: griffe.Object, scratch: Path) -> Iterator[ApiChange]:
    place = _place(new, scratch)
    if isinstance(old, griffe.Module) and isinstance(new, griffe.Module):
        # Upstream's convention for layers: `from . import layers`. What a module imports of itself ends there.
        if name.count(".") < _NESTED:
            yield from _changes(old, new, scratch, f"{name}.")
    elif old.kind is not new.kind:
        yield ApiChange("breaks", name, f"was {_a(old)} and is now {_a(new)}", *place)
    elif isinstance(old, griffe.Function) and isinstance(new, griffe.Function):
        for what in (*labels(old, new), *overloads(old, new)):
            yield ApiChange("breaks", name, what, *place)
        for what in signature(old, new):
            yield ApiChange("breaks", name, what, *place)
        known = {parameter.name for parameter in old.parameters}
        for parameter in new.parameters:
            if parameter.name not in known and not parameter.required:
                yield ApiChange("adds", name, f"optional parameter {parameter.name!r} added", *place)
    elif isinstance(old, griffe.Class) and isinstance(new, griffe.Class):
        yield from _members(name, old, new, scratch)
    elif isinstance(old, griffe.Attribute) and isinstance(new, griffe.Attribute):
        for what in labels(old, new):
            yield ApiChange("breaks", name, what, *place)
        if old.annotation is not None and str(old.annotation) != str(new.annotation):
            yield ApiChange("breaks", name, f"type changed from {old.annotation} to {new.annotation}", *place)


def _a(what: griffe.Object) -> str:
    return f"{'an' if what.kind.value.startswith('a') else 'a'} {what.kind.value}"


def _members(name: str, old: griffe.Class, new: griffe.Class, scratch: Path) -> Iterator[ApiChange]:
    place = _place(new, scratch)
    for base in old.bases:
        if str(base) not in map(str, new.bases):
            yield ApiChange("breaks", name, f"no longer derives from {base}", *place)
    for member, inherited in old.all_members.items():
        before = _final(inherited)
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
        elif (after := _final(new.all_members[member])) is not None:
            yield from _between(f"{name}.{member}", before, after, scratch)
    for member in new.members:
        if not member.startswith("_") and member not in old.all_members:
            yield ApiChange("adds", f"{name}.{member}", "new", *place)


def _place(found: griffe.Object, scratch: Path) -> tuple[str, int | None]:
    path = found.filepath
    if isinstance(path, list) or path is None:
        return "", found.lineno
    return path.resolve().relative_to(scratch / "new" / _PACKAGE).as_posix(), found.lineno
