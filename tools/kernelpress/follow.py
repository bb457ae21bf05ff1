"""Names of operators that one module of a package takes from another: found where they are written."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field

from kernelpress.files import SourceFile
from kernelpress.handed_on import absolute
from kernelpress.layout import Layout
from kernelpress.occurrences import Problem, Site, Wanted
from kernelpress.shared import Shared
from kernelpress.sites import Finder

# Imports from module to module that are followed for one name.
_REDIRECTS = 20
_UNKNOWN = (
    "{name} is taken from another module, and the build cannot see there what it stands for",
    "write the operator's name out there as a string, at the top of the module, and assign it once",
)


@dataclass
class Followed:
    """What following a file's names has added to files: sites and problems by the files' paths."""

    sites: dict[str, list[Site]] = field(default_factory=dict)
    problems: dict[str, list[Problem]] = field(default_factory=dict)


def follow(
    asked: Sequence[tuple[SourceFile, tuple[Wanted, ...]]], layout: Layout, shared: Shared
) -> Followed:
    """Look up what files want of others.

    Args:
        asked: Every file of the package, with what it wants.
        layout: What ships, and where.
        shared: What the files of the package share.
    """
    found = Followed()
    modules = _Modules(
        {layout.module_at(file.path): file for file, _ in asked if file.path.endswith(".py")}, shared
    )
    for file, wanted in asked:
        for each in wanted:
            sites = modules.sites(each, layout.module_at(file.path), file.path)
            if sites is None:
                message, fix = _UNKNOWN
                problem = Problem(each.line, message.format(name=repr(each.name.lstrip("."))), fix)
                found.problems.setdefault(file.path, []).append(problem)
            for path, site in sites or ():
                found.sites.setdefault(path, []).append(site)
    return found


class _Modules:
    def __init__(self, files: dict[str, SourceFile], shared: Shared) -> None:
        self.files = files
        self.shared = shared
        self.finders: dict[str, Finder] = {}

    def sites(
        self, wanted: Wanted, module: str, path: str, depth: int = _REDIRECTS
    ) -> list[tuple[str, Site]] | None:
        """Where a name is written that the module at ``path`` wants; ``None`` if that cannot be told."""
        parts = absolute(wanted.name, module, path)
        count = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in self.files), 0)
        if not depth or count == len(parts):
            return None
        if parts[-2:-1] == ["_ops"] or "_ops" in parts[count:-1]:
            return []  # the module that the build generates
        source = ".".join(parts[:count])
        if source not in self.files:
            return None
        finder = self.finder(source)
        finder.sites, finder.problems, finder.wanted = [], [], []
        node = ast.parse(".".join(parts[count:]), mode="eval").body
        if wanted.kind == "operator":
            finder.operator(node, creates=wanted.creates)
        elif wanted.kind == "namespace":
            finder.whole(node, creates=wanted.creates)
        elif not finder.literal_operator(finder.resolved(node), creates=False):
            finder.imported(node, finder.resolved(node), "name", creates=False)
        if finder.problems:
            return None
        found = [(self.files[source].path, site) for site in finder.sites]
        for each in tuple(finder.wanted):
            further = self.sites(each, source, self.files[source].path, depth - 1)
            if further is None:
                return None
            found += further
        return found

    def finder(self, module: str) -> Finder:
        if module not in self.finders:
            file = self.files[module]
            self.finders[module] = Finder(file.tree, file.text, self.shared, module, file.path)
            self.finders[module].scopes = [file.tree]
        return self.finders[module]
