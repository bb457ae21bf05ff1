"""What expressions of a source say without being run: names bound once, text they begin with, words they use."""

from __future__ import annotations

import ast
import re

from kernelpress.text import statements

_NAME_KEYWORDS = ("qualname", "name", "op", "opname", "ns")


def words(tree: ast.Module, libraries: frozenset[str]) -> re.Pattern[bytes]:
    """What a statement must mention to be of interest: parts of torch, or names that stand for them."""
    words = {"ops", "library", "_C", *libraries}
    for node in statements(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("torch")):
            words |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            words |= {
                alias.asname for alias in node.names if alias.asname and alias.name.startswith("torch.")
            }
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute | ast.Name):
            words |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return re.compile(rb"\b(?:%s)\b" % b"|".join(re.escape(word.encode()) for word in sorted(words)))


def constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Names of the module that are bound once, to something whose text is known."""
    bound: dict[str, list[ast.expr | None]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    bound.setdefault(target.id, []).append(node.value)
        elif isinstance(node, ast.AnnAssign | ast.AugAssign) and isinstance(node.target, ast.Name):
            value = node.value if isinstance(node, ast.AnnAssign) else None
            bound.setdefault(node.target.id, []).append(value)
    return {name: values[0] for name, values in bound.items() if len(values) == 1 and values[0] is not None}


def varying(node: ast.AST) -> list[str]:
    """Names that stand for something else each time: parameters and variables of loops."""
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        return [each.id for each in ast.walk(node.target) if isinstance(each, ast.Name)]
    return []


def naming_argument(call: ast.Call) -> ast.expr | None:
    """The argument that names the operator or the namespace: the first one, or that of its keyword."""
    if call.args:
        return None if isinstance(call.args[0], ast.Starred) else call.args[0]
    return next((each.value for each in call.keywords if each.arg in _NAME_KEYWORDS), None)


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
    """Whether an expression is a string, or puts one together."""
    if isinstance(node, ast.JoinedStr | ast.BinOp) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    ):
        return True
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("format", "join", "replace")
    )
