"""What each file holds that may have to change; the costly part of a build, and so done at most once a content."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

from kernelpress.files import SourceFile
from kernelpress.imports import Import, Imports, find_imports
from kernelpress.layout import Layout
from kernelpress.leftovers import mentions
from kernelpress.memory import Memory, key
from kernelpress.occurrences import Mention, Problem, Site, Sites, Wanted
from kernelpress.shared import Shared, shared
from kernelpress.sites import find_sites
from kernelpress.text import MOST_NESTED, Edit, Text, parse

# Bytes of sources from which on it is faster to start further processes than to do without.
_WORTH_PROCESSES = 1_000_000
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


def analyse(files: Sequence[SourceFile], layout: Layout, memory: Memory) -> list[Analysis]:
    """Look at every file of a package, in the order given, as far as it is not in memory."""
    common = shared(files, layout, memory)
    around = json.dumps(
        [
            layout.package,
            sorted(layout.vendored),
            layout.named_whole,
            sorted(common.libraries),
            sorted(common.ops),
            sorted((name, sorted(found)) for name, found in common.given.items()),
        ]
    ).encode()
    keys = [key("analysis", around, file.path.encode("utf-8"), file.data) for file in files]
    found = {each: _from_json(kept) for each in keys if (kept := memory.get(each)) is not None}
    new = {each: file for each, file in zip(keys, files, strict=True) if each not in found}
    look = partial(_analyse, layout=layout, common=common)
    if sum(len(file.data) for file in new.values()) < _WORTH_PROCESSES:
        looked = [look(file) for file in new.values()]
    else:
        # Imported here: an unchanged build has no use for it, and it takes longer than all of such a build's reading.
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        from kernelpress.interrupts import left_to_this_process

        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            with left_to_this_process():
                coming = pool.map(look, new.values(), chunksize=16)
            looked = list(coming)
    for each, analysis in zip(new, looked, strict=True):
        memory.put(each, _to_json(analysis))
        found[each] = analysis
    return [found[each] for each in keys]


def _analyse(file: SourceFile, layout: Layout, common: Shared) -> Analysis:
    if not file.path.endswith((".py", ".pyi")):
        return Analysis()
    tree, text = parse(file.data), Text(file.data)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _FRAMES * MOST_NESTED + limit))
    try:
        module = layout.module_at(file.path)
        sites: Sites = find_sites(tree, text, common, module, file.path)
        imports: Imports = find_imports(tree, text, file.path, module, layout)
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
        mentions(tree, text, sites.sites),
    )


def _to_json(analysis: Analysis) -> list[Any]:
    return [
        [astuple(site) for site in analysis.sites],
        analysis.escapes,
        [astuple(problem) for problem in analysis.problems],
        [[edit.start, edit.end, edit.text and edit.text.decode("utf-8")] for edit in analysis.edits],
        [astuple(each) for each in analysis.missing],
        [astuple(each) for each in analysis.outside],
        analysis.unknown,
        analysis.unread,
        [astuple(each) for each in analysis.wanted],
        [astuple(each) for each in analysis.mentions],
    ]


def _from_json(kept: list[Any]) -> Analysis:
    sites, escapes, problems, edits, missing, outside, unknown, unread, wanted, mentioned = kept
    return Analysis(
        tuple(Site(*each) for each in sites),
        tuple(escapes),
        tuple(Problem(*each) for each in problems),
        tuple(Edit(start, end, None if text is None else text.encode("utf-8")) for start, end, text in edits),
        tuple(Import(*each) for each in missing),
        tuple(Import(*each) for each in outside),
        tuple(unknown),
        tuple(unread),
        tuple(Wanted(*each) for each in wanted),
        tuple(Mention(*each) for each in mentioned),
    )
