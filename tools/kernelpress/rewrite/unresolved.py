"""Names of operators that stand in a source as plain text, which the build leaves as they are."""

from __future__ import annotations

import ast
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from kernelpress.rewrite.references import Mention, Reference
from kernelpress.rewrite.torch_library import LIBRARY_METHODS
from kernelpress.syntax.expressions import first_literal
from kernelpress.syntax.source_file import SourceFile
from kernelpress.syntax.text import SourceText

# A name or a schema as a whole, or the beginning of a name that is put together; and as graphs of torch.fx have it.
_NAME = re.compile(r"([A-Za-z_]\w*)(?:::\w*(?:\.\w+)?(?:\(.*)?|\.\w+\.default)", re.DOTALL)
# A source without any of these holds none.
_MENTIONS = re.compile(rb"\w::|\.default['\"]|\bops\s*[.\\)]")


def find_mentions(file: SourceFile, references: Iterable[Reference]) -> tuple[Mention, ...]:
    """Find where a file names operators other than in a reference.

    Those are strings that are handed to a function, compared or looked up, and attributes of an ``ops`` that may be
    any. What is only said or returned is none.
    """
    tree, text = file.tree, file.text
    references = list(references)
    starts = {reference.start for reference in references}
    ends = {reference.end for reference in references}
    offsets = [
        match.start()
        for match in _MENTIONS.finditer(text.data)
        if match.end() not in starts and match.start() + 1 not in ends
    ]
    if not offsets:
        return ()
    mentions = set()
    for node in _nodes_at(tree, text, offsets):
        registers = isinstance(node, ast.Call) and getattr(node.func, "attr", None) in LIBRARY_METHODS
        for expression, namespace in _named_namespaces(node):
            start, end = text.span(expression)
            if not any(start <= known < end for known in starts):
                mentions.add(Mention(expression.lineno, namespace, registers))
    return tuple(sorted(mentions, key=lambda mention: (mention.line, mention.namespace)))


def _nodes_at(tree: ast.Module, text: SourceText, offsets: list[int]) -> Iterator[ast.AST]:
    """The nodes of a tree, without statements that hold none of some offsets, which are most of it, and of the time."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        # Decorators stand before the statement that they are of.
        if isinstance(node, ast.stmt) and not getattr(node, "decorator_list", ()):
            start, end = text.span(node)
            index = bisect_left(offsets, start)
            if index == len(offsets) or offsets[index] >= end:
                continue
        yield node
        pending.extend(ast.iter_child_nodes(node))


def _named_namespaces(node: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """The namespaces that an expression names, each with the expression that does."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
        holder = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
        if holder == "ops":
            yield node, node.attr
    for part in _used_values(node):
        for value in part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]:
            leading = first_literal(value)
            match = _NAME.fullmatch(leading[1]) if leading else None
            if leading and match:
                yield leading[0], match[1]


def _used_values(node: ast.AST) -> list[ast.expr]:
    """The expressions that one hands to a function, compares or looks up."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == "print":
            return []
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Subscript):
        return [node.slice]
    if isinstance(node, ast.MatchValue):
        return [node.value]
    if isinstance(node, ast.Dict):
        return [key for key in node.keys if key is not None]
    return []
