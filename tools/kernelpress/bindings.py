"""What the names of a module may stand for, of other modules."""

from __future__ import annotations

import ast
import re

from kernelpress.files import SourceFile
from kernelpress.names import ScopedVisitor

MENTIONS = re.compile(
    rb"\b_?library\b|\b_custom_ops?\b|\bimport\b(?:[^\n(]*|\s*\([^)]*)\bops\b|\bops\s*(?:[#;)\r]|$)",
    re.MULTILINE,
)
"""A source without any of these binds nothing of PyTorch's that takes or holds operators, but by other modules."""


def bound_names(file: SourceFile) -> dict[str, list[str]]:
    """Full names by the names of a module, and under ``*`` the modules that all names are taken from."""
    table = {}
    visitor = ScopedVisitor(walrus=b":=" in file.data)
    visitor.scopes = [file.tree]
    for name in visitor.bound_here():
        fulls = [
            full for full in visitor.names(ast.Name(name, ast.Load())) if not full.startswith("builtins.")
        ]
        if fulls:
            table[name] = sorted(map(_holder, fulls) if name == "*" else fulls)
    return table


def _holder(star: str) -> str:
    """Where an import takes all names from."""
    return star[:-1].rstrip(".") or star[:-1]
