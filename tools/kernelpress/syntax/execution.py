"""The time at which each part of a source executes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Literal

# With the module, only under a condition or caught where it fails, in a function, or never.
When = Literal["load", "guarded", "call", "typing"]

_CAUGHT = frozenset(("ImportError", "ModuleNotFoundError", "Exception", "BaseException"))


def execution_times(
    tree: ast.AST, when: When = "load", *, calls: bool = True
) -> Iterator[tuple[ast.AST, When]]:
    """Every node below one, with the time it executes at; without ``calls``, imports and what may hold some alone."""
    for name, value in ast.iter_fields(tree):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or not (calls or _may_import(child)):
                continue
            inner = _inner(tree, name, when)
            yield child, inner
            yield from execution_times(child, inner, calls=calls)


def _may_import(node: ast.AST) -> bool:
    """True for an import, and for a statement with others in it."""
    return isinstance(node, ast.Import | ast.ImportFrom | ast.Match) or (
        hasattr(node, "body") and not isinstance(node, ast.expr)
    )


def _inner(parent: ast.AST, field: str, when: When) -> When:
    """The time at which the code in a field of a node executes."""
    if when in ("typing", "call"):
        return when
    if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and field == "body":
        return "call"
    if isinstance(parent, ast.If):
        test = ast.unparse(parent.test)
        if field == "body" and test in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return "typing"
        if field in ("body", "orelse") and "TYPE_CHECKING" not in test:
            return "guarded"
    if isinstance(parent, ast.Try) and field == "body" and any(map(_catches, parent.handlers)):
        return "guarded"
    if (
        isinstance(parent, ast.With)
        and field == "body"
        and any("suppress" in ast.unparse(i) for i in parent.items)
    ):
        return "guarded"
    if isinstance(parent, ast.ExceptHandler) and _catches(parent):
        return "guarded"
    return when


def _catches(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(kind) in _CAUGHT for kind in kinds)
