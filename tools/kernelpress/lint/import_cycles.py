"""Circles of modules that import each other while they are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kernelpress.syntax.imports import imported_modules
from kernelpress.syntax.source_file import SourceFile


def import_cycles(modules: Mapping[str, SourceFile]) -> Iterator[tuple[str, ...]]:
    """A circle of imports, each module importing the next, out of each group that imports one another.

    Args:
        modules: The files of a package by their modules' full names.
    """
    graph = {module: _imported_when_loaded(module, modules) for module in modules}
    reachable = {module: _reachable(module, graph) for module in graph}
    grouped: set[str] = set()
    for module, others in reachable.items():
        if module in grouped or module not in others:
            continue
        grouped.update(other for other in others if module in reachable[other])
        yield _shortest_cycle(module, graph)


def _shortest_cycle(start: str, graph: Mapping[str, Mapping[str, None]]) -> tuple[str, ...]:
    """Modules from one on, each of which imports the next, and the last one the first."""
    routes: list[tuple[str, ...]] = [(start,)]
    visited = {start}
    for route in routes:
        for target in graph[route[-1]]:
            if target == start:
                return route
            if target not in visited:
                visited.add(target)
                routes.append((*route, target))
    raise AssertionError(f"{start} is in no circle")


def _imported_when_loaded(module: str, modules: Mapping[str, SourceFile]) -> dict[str, None]:
    targets: dict[str, None] = {}
    for source, names, when in imported_modules(modules[module], module):
        if when not in ("load", "guarded"):
            continue
        submodules = [f"{source}.{name}" for name in names if f"{source}.{name}" in modules]
        # A package asked for its own modules need not be done with loading.
        targets |= dict.fromkeys(submodules or [source] if source in modules or submodules else [])
    # The packages around a module begin to load before it, whichever module is imported first.
    return {target: None for target in targets if not f"{module}.".startswith(f"{target}.")}


def _reachable(module: str, graph: Mapping[str, Mapping[str, None]]) -> dict[str, None]:
    """Modules that a module imports, directly or through others, in the order in which they are met."""
    pending = list(graph[module])
    visited: dict[str, None] = {}
    while pending:
        target = pending.pop(0)
        if target not in visited:
            visited[target] = None
            pending.extend(graph[target])
    return visited
