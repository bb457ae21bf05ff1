"""What the names of a module may stand for, of other modules."""

from __future__ import annotations

import ast
import re

from kernelpress.memory import Memory, key
from kernelpress.names import ScopedVisitor
from kernelpress.text import parse

MENTIONS = re.compile(
    rb"\b_?library\b|\b_custom_ops?\b|\bimport\b(?:[^\n(]*|\s*\([^)]*)\bops\b|\bops\s*(?:[#;)\r]|$)",
    re.MULTILINE,
)
"""A source without any of these binds nothing of PyTorch's that takes or holds operators, but by other modules."""


def bound_names(data: bytes, memory: Memory, tree: ast.Module | None = None) -> dict[str, list[str]]:
    """Full names by the names of a module, and under ``*`` the modules that all names are taken from.

    Args:
        data: The module's source.
        memory: What is known of sources; spares the work.
        tree: The source's syntax tree, where there is one already: to parse is most of the work.
    """
    known = key("names", data)
    table: dict[str, list[str]] | None = memory.get(known)
    if table is None:
        table = {}
        visitor = ScopedVisitor(walrus=b":=" in data)
        visitor.scopes = [parse(data) if tree is None else tree]
        for name in visitor.bound_here():
            fulls = [
                full for full in visitor.names(ast.Name(name, ast.Load())) if not full.startswith("builtins.")
            ]
            if fulls:
                table[name] = sorted(map(_holder, fulls) if name == "*" else fulls)
        memory.put(known, table)
    return table


def _holder(star: str) -> str:
    """Where an import takes all names from."""
    return star[:-1].rstrip(".") or star[:-1]
