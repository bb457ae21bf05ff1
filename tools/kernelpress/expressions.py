"""What expressions of a source say without being run: text they begin with, words they use."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

from kernelpress.names import assigned, choices
from kernelpress.text import statements

# Words of which a source that names an operator holds one, or else a name for a `Library` or for `torch.ops`.
ALWAYS = ("ops", "library", "_C", "_library", "_custom_op", "_custom_ops")
_GIVING = ("getattr", "partial", "Library", "_scoped_library")


def words(
    tree: ast.Module, further: frozenset[str], tops: frozenset[str], *, walrus: bool
) -> re.Pattern[bytes]:
    """What a statement must mention to be of interest: parts of torch, or names that stand for them.

    Args:
        tree: The source.
        further: Names that other sources know.
        tops: First parts of the names of the package's modules.
        walrus: Whether there are assignments within expressions.
    """
    words = {*ALWAYS, *further}
    pairs: list[tuple[ast.Name, ast.expr]] = []
    for node in statements(tree):
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").partition(".")[0] in ("torch", *tops)
        ):
            words |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            words |= {
                alias.asname for alias in node.names if alias.asname and alias.name.startswith("torch.")
            }
        elif isinstance(node, ast.Assign):
            pairs += (pair for target in node.targets for pair in assigned(target, node.value))
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            pairs += assigned(node.target, node.value)
    if walrus:
        pairs += ((node.target, node.value) for node in ast.walk(tree) if isinstance(node, ast.NamedExpr))
    calls = []
    for name, value in pairs:
        for each in choices(value):
            if isinstance(each, ast.Attribute | ast.Name):
                words.add(name.id)
            elif isinstance(each, ast.Call):
                calls.append((name.id, each.func))
    # Of calls, those of what PyTorch has, and of what gives what it is asked for.
    for bound, function in calls:
        called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if called in words or called in _GIVING:
            words.add(bound)
    return mentions(words)


def mentions(words: Iterable[str]) -> re.Pattern[bytes]:
    """Any of some names in a source; bytes beyond ASCII are letters."""
    alternatives = b"|".join(re.escape(word.encode("utf-8")) for word in sorted(words))
    return re.compile(rb"(?<![\w\x80-\xff])(?:%s)(?![\w\x80-\xff])" % alternatives)


def rebound(tree: ast.Module) -> frozenset[str]:
    """Names that functions bind outside of themselves."""
    return frozenset(
        name for node in ast.walk(tree) if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names
    )


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
