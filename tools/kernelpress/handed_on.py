"""What modules of a package hand on of PyTorch's own: functions that register operators, and ``torch.ops``.

An import of ``custom_op`` from a module of the package shows nothing of what it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kernelpress.bindings import MENTIONS, bound_names
from kernelpress.files import SourceFile
from kernelpress.layout import Layout

_OF_INTEREST = re.compile(
    r"torch\.(ops|_ops|_ops\.ops|library(\.\w+)?|(_library|_custom_ops?)(\.[\w.]+)?)",
)
# Rounds of following imports, each through one module more.
_ROUNDS = 20


def absolute(name: str, module: str, path: str) -> list[str]:
    """The parts of a name as an import in the module at ``path`` has it, in full."""
    dots = len(name) - len(name.lstrip("."))
    parts = [part for part in name[dots:].split(".") if part]
    if not dots:
        return parts
    around = module.split(".") if path.endswith("__init__.py") else module.split(".")[:-1]
    return [*around[: len(around) - (dots - 1)], *parts]


def stands_for(parts: Sequence[str], given: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """PyTorch's names of what the package calls by a full name."""
    for count in range(len(parts), 1, -1):
        found = given.get(".".join(parts[:count]))
        if found is not None:
            rest = "".join(f".{part}" for part in parts[count:])
            return frozenset(f"{name}{rest}" for name in found)
    return frozenset()


def handed_on(files: Sequence[SourceFile], layout: Layout) -> dict[str, frozenset[str]]:
    """Full names in the package that stand for something of PyTorch's that takes or holds operators.

    Args:
        files: The package's files.
        layout: What ships, and where.
    """
    sources = [(file, layout.module_at(file.path)) for file in files if file.path.endswith(".py")]
    tables: dict[str, tuple[str, dict[str, list[str]]]] = {}
    given: dict[str, frozenset[str]] = {}
    wanted = MENTIONS
    for _ in range(_ROUNDS):
        for file, module in sources:
            if module not in tables and wanted.search(file.data):
                tables[module] = file.path, bound_names(file)
        before = None
        while before != (before := dict(given)):
            for module, (path, table) in tables.items():
                _add(given, module, path, table)
        if not given:
            break
        names = {full.rpartition(".")[2] for full in given}
        alternatives = "|".join(map(re.escape, sorted(names))).encode("utf-8")
        following = re.compile(rb"\bimport\s*\*|\bimport\b(?:[^\n(]*|\s*\([^)]*)\b(?:%s)\b" % alternatives)
        if following.pattern == wanted.pattern:
            break
        wanted = following
    return given


def _add(given: dict[str, frozenset[str]], module: str, path: str, table: dict[str, list[str]]) -> None:
    """What one module binds, as far as it is known already what that stands for."""
    for name, fulls in table.items():
        for full in fulls:
            if name == "*":
                source = ".".join(absolute(full, module, path))
                for each, found in list(given.items()):
                    holder, _, last = each.rpartition(".")
                    if holder == source and not last.startswith("_"):
                        given[f"{module}.{last}"] = given.get(f"{module}.{last}", frozenset()) | found
                continue
            if _OF_INTEREST.fullmatch(full):
                found = frozenset((full,))
            else:
                found = stands_for(absolute(full, module, path), given)
            if found:
                given[f"{module}.{name}"] = given.get(f"{module}.{name}", frozenset()) | found
