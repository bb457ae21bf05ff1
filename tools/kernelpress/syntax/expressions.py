"""Expressions that are text."""

from __future__ import annotations

import ast


def first_literal(node: ast.expr) -> tuple[ast.expr, str] | None:
    """The literal that an expression's value begins with, and the text it has there."""
    while True:
        if isinstance(node, ast.BinOp):
            node = node.left
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format"
        ):
            node = node.func.value
        else:
            break
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node, node.value
    if isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):
        return node, str(node.values[0].value)
    return None


def is_text(node: ast.expr) -> bool:
    """True for a string, and for an expression that puts one together."""
    if isinstance(node, ast.JoinedStr | ast.BinOp) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    ):
        return True
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("format", "join", "replace")
    )
