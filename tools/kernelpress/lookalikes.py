"""Strings that look like names of the package's own operators and are left as they are, where code goes by them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from itertools import chain

from kernelpress.text import parse

_METHODS = ("startswith", "removeprefix", "get")


def lookalikes(data: bytes, namespaces: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Lines and texts of strings that are compared or looked up, and name an operator by its namespace in place.

    Args:
        data: A source in which what names operators for certain has been replaced.
        namespaces: Those that the package defines in place.
    """
    own = "|".join(map(re.escape, namespaces))
    # Graphs of torch.fx name their targets `namespace.operator.overload`.
    form = rf"(?:{own})(?:::\w*(?:\.\w+)?|\.\w+\.default)"
    if not namespaces or not re.search(rf"['\"]{form}['\"]".encode(), data):
        return
    for node in ast.walk(parse(data)):
        for each in _deciding(node):
            text = each.value if isinstance(each, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(form, text):
                yield each.lineno, text


def _deciding(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions within a node whose value decides what happens."""
    if isinstance(node, ast.Compare):
        for each in (node.left, *node.comparators):
            yield from each.elts if isinstance(each, ast.Tuple | ast.List | ast.Set) else (each,)
    elif isinstance(node, ast.Subscript):
        yield node.slice
    elif isinstance(node, ast.Dict):
        yield from (key for key in node.keys if key is not None)
    elif isinstance(node, ast.MatchValue):
        yield node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
        yield from chain.from_iterable(
            each.elts if isinstance(each, ast.Tuple) else (each,) for each in node.args[:1]
        )
