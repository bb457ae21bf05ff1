"""The modules that a Python file imports, and when."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from kernelpress.syntax.dynamic_imports import may_name
from kernelpress.syntax.execution import When, execution_times
from kernelpress.syntax.scopes import Module
from kernelpress.syntax.source_file import SourceFile


@dataclass(frozen=True)
class Import:
    """A module that a file imports: its full name in place, the line, and the time at which that line executes."""

    module: str
    line: int
    when: When


def imported_modules(file: SourceFile, name: str) -> Iterator[tuple[str, tuple[str, ...], When]]:
    """Each import of a module as a full module name, the names taken from it, and when it runs.

    Args:
        file: The module's file.
        name: Its name in place.
    """
    module = Module(file, name)
    for node, when in execution_times(file.tree, calls=may_name(file.data)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, (), when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = module.absolute(node.module, node.level)
            if source is not None:
                yield source, tuple(alias.name for alias in node.names), when
        elif isinstance(node, ast.Call) and node.args:
            first = node.args[0]
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value), (), when
