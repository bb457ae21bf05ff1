"""Analysis of a source file: all that may have to change in it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from kernelpress.files import SourceFile
from kernelpress.imports import Import, Imports, find_imports
from kernelpress.layout import Layout
from kernelpress.leftovers import mentions
from kernelpress.occurrences import Mention, Problem, Site, Sites, Wanted
from kernelpress.shared import Shared
from kernelpress.sites import find_sites
from kernelpress.text import MOST_NESTED, Edit

# Calls of a visitor for each level of a syntax tree, at most.
_FRAMES = 6


@dataclass(frozen=True)
class Analysis:
    """One file: see ``Sites`` and ``Imports`` for what each part is; ``mentions`` are found beside them."""

    sites: tuple[Site, ...] = ()
    escapes: tuple[int, ...] = ()
    problems: tuple[Problem, ...] = ()
    edits: tuple[Edit, ...] = ()
    missing: tuple[Import, ...] = ()
    outside: tuple[Import, ...] = ()
    unknown: tuple[int, ...] = ()
    unread: tuple[int, ...] = ()
    wanted: tuple[Wanted, ...] = ()
    mentions: tuple[Mention, ...] = ()


def analyze(file: SourceFile, layout: Layout, common: Shared) -> Analysis:
    """Analyze one file of a package, given what its files share."""
    if not file.is_python:
        return Analysis()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _FRAMES * MOST_NESTED + limit))
    try:
        module = layout.module_at(file.path)
        sites: Sites = find_sites(file.tree, file.text, common, module, file.path)
        imports: Imports = find_imports(file.tree, file.text, file.path, module, layout)
    finally:
        sys.setrecursionlimit(limit)
    return Analysis(
        sites.sites,
        sites.escapes,
        sites.problems,
        imports.edits,
        imports.missing,
        imports.outside,
        imports.unknown,
        imports.unread,
        sites.wanted,
        mentions(file.tree, file.text, sites.sites),
    )
