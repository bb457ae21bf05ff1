"""Modules from outside of the package that ship with it: those that `include` lists, and all that they import."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from kernelpress.errors import SourceError
from kernelpress.source.file import read_file
from kernelpress.source.module_map import VENDOR, ModuleMap, module_file
from kernelpress.syntax.imports import imported_modules
from kernelpress.syntax.source_file import SourceFile

_EMPTY = b""
# The package stands at the kernel's top and not below its parents' names, so they give it to whoever asks for it there.
_PARENT = """def __getattr__(name):
    if name == "{name}":
        return __import__(__name__.partition(".")[0])
    raise AttributeError(name)
"""


def vendor(
    include: Iterable[str],
    package: str,
    roots: tuple[Path, ...],
    own_files: Iterable[SourceFile],
) -> tuple[ModuleMap, list[SourceFile]]:
    """Collect what ships beside the package.

    Args:
        include: Files and directories, relative to one of ``roots``.
        package: The package's dotted name.
        roots: First the directory that the project's modules are imported from, then the project's own.
        own_files: The package's own files.

    Returns:
        The module_map of the kernel, and the files to add to the package's own.

    Raises:
        SourceError: Something listed is not there, belongs to the package anyway, or cannot ship.
    """
    own = ModuleMap(package)
    tops = {package.partition(".")[0]}
    vendored: dict[str, SourceFile] = {}
    pending = []
    for entry in include:
        for module in _listed(entry, roots):
            tops.add(module.partition(".")[0])
            if own.owns(module):
                raise SourceError(f"`include` lists {entry!r}, which is in the package anyway; remove it")
            pending.append(module)
    while pending:
        module = pending.pop()
        if module in vendored:
            continue
        path = next((origin for root in roots if (origin := module_file(root, module)) is not None), None)
        if path is None:
            continue
        stem = "/".join((VENDOR, *module.split(".")))
        place = f"{stem}/__init__.py" if path.name == "__init__.py" else f"{stem}.py"
        vendored[module] = read_file(path, place)
        pending += _project_imports(vendored[module], module, tops, own, roots)
    whole = re.compile(rb"^\s*import\b.*\b%s\." % package.partition(".")[0].encode(), re.MULTILINE)
    named = "." in package and any(whole.search(file.data) for file in own_files)
    module_map = ModuleMap(package, frozenset(vendored), named)
    return module_map, [*vendored.values(), *_parents(module_map)]


def _listed(entry: str, roots: tuple[Path, ...]) -> Iterator[str]:
    for root in roots:
        path = root / entry
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.is_file() else []
        for file in files:
            parts = file.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not all(part.isidentifier() for part in parts) or file.suffix != ".py":
                raise SourceError("`include` lists this, which Python cannot import; list modules", path=file)
            yield ".".join(parts)
        if files:
            return
    raise SourceError(
        f"`include` lists {entry!r}, and there is no such module below {' or '.join(map(str, roots))}; "
        "write its path from there"
    )


def _project_imports(
    file: SourceFile, module: str, tops: set[str], own: ModuleMap, roots: tuple[Path, ...]
) -> Iterator[str]:
    for source, names, when in imported_modules(file, module):
        if when == "typing" or source.partition(".")[0] not in tops or own.owns(source):
            continue
        modules = [f"{source}.{name}" for name in names]
        submodules = [name for name in modules if any(module_file(root, name) for root in roots)]
        yield from (name for name in submodules if not own.owns(name))
        # A package whose modules alone are asked for need not run its own __init__.
        if len(submodules) < len(modules) or not names:
            yield source


def _parents(module_map: ModuleMap) -> Iterator[SourceFile]:
    if not (module_map.vendored or module_map.named_whole):
        return
    yield SourceFile(f"{VENDOR}/__init__.py", _EMPTY)
    holder, _, name = module_map.package.rpartition(".")
    for parent in sorted(module_map.parents):
        data = _PARENT.format(name=name).encode("ascii") if parent == holder else _EMPTY
        yield SourceFile(f"{VENDOR}/{parent.replace('.', '/')}/__init__.py", data)
