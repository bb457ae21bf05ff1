"""What each file holds that may have to change; the costly part of a build, and so done at most once a content."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from kernelpress.files import SourceFile
from kernelpress.imports import Import, Imports, find_imports
from kernelpress.layout import Layout
from kernelpress.sites import Problem, Site, Sites, find_sites, library_names
from kernelpress.text import Edit, Text, parse

# Bytes of sources from which on it is faster to start further processes than to do without.
_WORTH_PROCESSES = 3_000_000


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
    look = partial(_analyse, layout=layout, libraries=libraries)
    if sum(len(file.data) for file in files) < _WORTH_PROCESSES:
        return [look(file) for file in files]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(look, files, chunksize=16))


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
