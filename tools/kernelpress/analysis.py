"""What each file holds that may have to change; the costly part of a build, and so done at most once a content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernelpress.files import SourceFile
from kernelpress.imports import Import, Imports, find_imports
from kernelpress.layout import Layout
from kernelpress.sites import Problem, Site, Sites, find_sites, library_names
from kernelpress.text import Edit, Text, parse


@dataclass(frozen=True)
class Analysis:
    """One file: see ``Sites`` and ``Imports`` for what each part is."""

    sites: tuple[Site, ...] = ()
    escapes: tuple[int, ...] = ()
    problems: tuple[Problem, ...] = ()
    edits: tuple[Edit, ...] = ()
    missing: tuple[Import, ...] = ()
    outside: tuple[Import, ...] = ()
    unknown: tuple[int, ...] = ()
    unread: tuple[int, ...] = ()


def analyse(files: Sequence[SourceFile], layout: Layout) -> list[Analysis]:
    """Look at every file of a package, in the order given."""
    libraries = library_names(files)
    return [_analyse(file, layout, libraries) for file in files]


def _analyse(file: SourceFile, layout: Layout, libraries: frozenset[str]) -> Analysis:
    if not file.path.endswith((".py", ".pyi")):
        return Analysis()
    tree, text = parse(file.data), Text(file.data)
    sites: Sites = find_sites(tree, text, libraries)
    imports: Imports = find_imports(tree, text, file.path, layout.module_at(file.path), layout)
    return Analysis(
        sites.sites,
        sites.escapes,
        sites.problems,
        imports.edits,
        imports.missing,
        imports.outside,
        imports.unknown,
        imports.unread,
    )
