"""What expressions of a source say without being run: text they begin with, words they use."""

from __future__ import annotations

import ast
import re

from kernelpress.text import statements

# Words of which a source that names an operator holds one, or else a name for a `Library` or for `torch.ops`.
ALWAYS = ("ops", "library", "_C")
_NAME_KEYWORDS = ("qualname", "name", "op", "opname", "ns")


def words(tree: ast.Module, further: frozenset[str]) -> re.Pattern[bytes]:
    """What a statement must mention to be of interest: parts of torch, or names that stand for them."""
    words = {*ALWAYS, *further}
    for node in statements(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("torch")):
            words |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            words |= {
                alias.asname for alias in node.names if alias.asname and alias.name.startswith("torch.")
            }
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
            node.value, ast.Attribute | ast.Name | ast.Call
        ):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            # Of calls, one of `getattr` alone gives what it is asked for.
            if not isinstance(node.value, ast.Call) or getattr(node.value.func, "id", "") == "getattr":
                words |= {target.id for target in targets if isinstance(target, ast.Name)}
    return re.compile(rb"\b(?:%s)\b" % b"|".join(re.escape(word.encode()) for word in sorted(words)))


def rebound(tree: ast.Module) -> frozenset[str]:
    """Names that functions bind outside of themselves."""
    return frozenset(
        name for node in ast.walk(tree) if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names
    )


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
