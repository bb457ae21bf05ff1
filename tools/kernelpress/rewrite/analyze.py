"""Analysis of a package's files: all that may have to change in each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from kernelpress.rewrite.op_references import find_op_references
from kernelpress.rewrite.other_uses import find_other_uses
from kernelpress.rewrite.references import Definition, Problem, Reference, own_namespaces
from kernelpress.rewrite.relative_imports import Imports, find_imports
from kernelpress.rewrite.resolve import MOST_VARIABLES, Resolver
from kernelpress.rewrite.unresolved import find_names_in_text
from kernelpress.source.module_map import ModuleMap
from kernelpress.syntax.source_file import SourceFile
from kernelpress.syntax.text import MOST_NESTED

# Calls for each level of a syntax tree, and for each variable that an expression's value goes through, at most.
_FRAMES = 6


@dataclass(frozen=True)
class Analysis:
    """One file, and what is found in it; ``leaked_ops`` are lines where ``torch.ops`` is handed on."""

    file: SourceFile
    references: tuple[Reference, ...] = ()
    leaked_ops: tuple[int, ...] = ()
    problems: tuple[Problem, ...] = ()
    imports: Imports = field(default_factory=Imports)
    definitions: tuple[Definition, ...] = ()
    module_names: tuple[int, ...] = ()


def analyze(files: Sequence[SourceFile], module_map: ModuleMap) -> list[Analysis]:
    """Analyze every file of a package, in the order given; those that are no Python have nothing in them."""
    resolver = Resolver(files, module_map)
    with _deep_recursion():
        operators = find_op_references(resolver)
        own = own_namespaces(ref for refs in operators.references.values() for ref in refs)
        find_other_uses(resolver, operators, own)
        module_names = find_names_in_text(resolver, operators, own, module_map.tops)
        modules = {module.file.path: module for module in resolver.modules.values()}
        return [
            Analysis(
                file,
                tuple(sorted(operators.references.get(file.path, ()), key=lambda reference: reference.start)),
                tuple(operators.leaked_ops.get(file.path, ())),
                tuple(dict.fromkeys(operators.problems.get(file.path, ()))),
                find_imports(modules[file.path], resolver, module_map),
                tuple(operators.definitions.get(file.path, ())),
                tuple(sorted(module_names.get(file.path, ()))),
            )
            if file.path in modules
            else Analysis(file)
            for file in files
        ]


@contextmanager
def _deep_recursion() -> Iterator[None]:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + _FRAMES * (MOST_NESTED + MOST_VARIABLES))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
