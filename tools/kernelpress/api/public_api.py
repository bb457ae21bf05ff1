"""The public API of a variant, read from its files without importing any of them."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import griffe

from kernelpress.errors import CheckError

# Stands for the package's own name, so that two builds of it can be compared.
PACKAGE = "kernel"
_INIT = "__init__.py"
# Imports and assignments that are followed for one name.
_REDIRECTS = 20


def load_api(files: Mapping[str, bytes]) -> griffe.Module:
    """Read the package in a variant.

    Args:
        files: The variant's files by their paths in it; the package is directly in it, or nested in its name.

    Raises:
        CheckError: The files hold no package.
    """
    folders = [PurePosixPath(path).parent for path in files if PurePosixPath(path).name == _INIT]
    if not folders:
        raise CheckError("what is published holds no Python package, so there is no API to compare with")
    top = min(folders, key=lambda path: len(path.parts))
    with tempfile.TemporaryDirectory(prefix="kernelpress-api-") as scratch:
        for name, data in files.items():
            path = PurePosixPath(name)
            if path.suffix in (".py", ".pyi") and path.is_relative_to(top):
                target = Path(scratch, PACKAGE, path.relative_to(top))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        package = griffe.load(PACKAGE, search_paths=[scratch], allow_inspection=False, resolve_aliases=True)
    assert isinstance(package, griffe.Module)
    return package


def public_names(module: griffe.Module) -> list[str]:
    """The names in ``__all__``, or where there is none all that do not begin with an underscore, less submodules."""
    if module.exports is None:
        return [name for name, member in module.members.items() if member.is_public and not member.is_module]
    listed = [str(name) for name in module.exports]
    for method, names in _calls_on_all(module):
        listed = [name for name in listed if name not in names] + ([] if method == "remove" else names)
    return listed


def _calls_on_all(module: griffe.Module) -> Iterator[tuple[str, list[str]]]:
    """Calls such as ``__all__.append("name")``, of which Griffe knows nothing: the method and the names."""
    for statement in ast.parse(module.source).body:
        match statement:
            case ast.Expr(
                ast.Call(
                    ast.Attribute(ast.Name("__all__"), "append" | "extend" | "insert" | "remove" as method)
                ) as call
            ):
                constants = [node for node in ast.walk(call) if isinstance(node, ast.Constant)]
                yield method, [node.value for node in constants if isinstance(node.value, str)]


def definition(module: griffe.Module, name: str) -> griffe.Object | None:
    """The object that a public name stands for; ``None`` where it comes from outside of the package."""
    member: griffe.Object | griffe.Alias | None = module.members.get(name)
    if isinstance(member, griffe.Module) and name in module.imports:
        # `from .twice import twice`: to Python the function hides the module, to Griffe it is the other way.
        member = module.modules_collection.members[PACKAGE]
        for part in module.imports[name].split(".")[1:]:
            member = member.members.get(part) if member is not None else None
    return None if member is None else final(member)


def final(member: griffe.Object | griffe.Alias) -> griffe.Object | None:
    """The object behind imports, inheritance and assignments (``f = g``); ``None`` where it comes from outside."""
    for _ in range(_REDIRECTS):
        try:
            if isinstance(member, griffe.Alias):
                member = member.final_target
            value = member.value if isinstance(member, griffe.Attribute) else None
            if not isinstance(value, griffe.ExprName | griffe.ExprAttribute):
                return member
            assigned = member.modules_collection[value.canonical_path]
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            break
        if assigned.is_module:
            break
        member = assigned
    return None if isinstance(member, griffe.Alias) else member


def location(member: griffe.Object) -> tuple[str, int | None]:
    """The file that an object stands in, relative to the package, and its line."""
    path, package = member.filepath, member.package.filepath
    if not isinstance(path, Path) or not isinstance(package, Path):
        return "", member.lineno
    return path.relative_to(package.parent).as_posix(), member.lineno
