"""Groups of modules that import each other while they are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kernelpress.syntax.imports import imported_modules
from kernelpress.syntax.source_file import SourceFile


def import_cycles(modules: Mapping[str, SourceFile]) -> Iterator[tuple[str, ...]]:
    """Each group of two or more modules every one of which imports all others, directly or through them.

    Args:
        modules: The files of a package by their modules' full names.
    """
    graph = {module: _imported_when_loaded(module, modules) for module in modules}
    reachable = {module: _reachable(module, graph) for module in graph}
    grouped: set[str] = set()
    for module, others in reachable.items():
        if module in grouped or module not in others:
            continue
        cycle = (module, *(other for other in others if other != module and module in reachable[other]))
        grouped.update(cycle)
        yield cycle


def _imported_when_loaded(module: str, modules: Mapping[str, SourceFile]) -> dict[str, None]:
    targets: dict[str, None] = {}
    for source, names, when in imported_modules(modules[module], module):
        if when not in ("load", "guarded"):
            continue
        submodules = [f"{source}.{name}" for name in names if f"{source}.{name}" in modules]
        # A package asked for its own modules need not be done with loading.
        targets |= dict.fromkeys(submodules or [source] if source in modules or submodules else [])
    targets.pop(module, None)
    return targets


def _reachable(module: str, graph: Mapping[str, Mapping[str, None]]) -> dict[str, None]:
    """Modules that a module imports, directly or through others, in the order in which they are met."""
    pending = list(graph[module])
    seen: dict[str, None] = {}
    while pending:
        target = pending.pop(0)
        if target not in seen:
            seen[target] = None
            pending.extend(graph[target])
    return seen
