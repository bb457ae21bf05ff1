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
# Functions that take code, or the dotted name of something, as text.
_RUN = frozenset(("attrgetter", "eval", "exec", "patch"))
_RUNS = re.compile(rb"\b(?:%s)\s*\(|\b__(?:name|module)__\b" % "|".join(sorted(_RUN)).encode())


def find_mentions(
    file: SourceFile, references: Iterable[Reference], namespaces: Iterable[str]
) -> tuple[Mention, ...]:
    """Find where a file names operators of some namespaces other than in a reference.

    Those are strings that are handed to a function, compared or looked up, and attributes of an ``ops`` that may be
    any. What is only said or returned is none.
    """
    tree, text = file.tree, file.text
    references = list(references)
    starts = {reference.start for reference in references}
    ends = {reference.end for reference in references}
    own = "|".join(sorted(namespaces)).encode("utf-8")
    if not own:
        return ()
    words = rb"(?<=['\"])(?:%s)['\"]|\w::|\.default['\"]|\bops\s*[.\\)]|%s" % (own, _RUNS.pattern)
    offsets = [
        match.start()
        for match in re.finditer(words, text.data)
        if starts.isdisjoint((match.start(), match.end())) and match.start() + 1 not in ends
    ]
    mentions = set()
    names = own.decode("utf-8")
    in_code = re.compile(rf"(?:\bops\.(?=\w+\.)|\b(?=\w+::))({names})\b")
    for node in _nodes_at(tree, text, offsets):
        registers = isinstance(node, ast.Call) and getattr(node.func, "attr", None) in LIBRARY_METHODS
        for expression, namespace in (*_named_namespaces(node), *_in_code(node, in_code)):
            start, end = text.span(expression)
            if not any(start <= resolved < end for resolved in starts):
                mentions.add(Mention(expression.lineno, namespace, registers))
    return tuple(sorted(mentions, key=lambda mention: (mention.line, mention.namespace)))


def find_module_names(file: SourceFile, tops: Iterable[str]) -> tuple[int, ...]:
    """Lines that name a module of the project in code as text, in a name to patch, or as ``__name__``."""
    offsets = [match.start() for match in _RUNS.finditer(file.data)]
    if not offsets:
        return ()
    own = "|".join(map(re.escape, sorted(tops)))
    pattern = re.compile(rf"(?:^|\bimport\s+|\bfrom\s+)({own})(?:\.\w|\s|$)")
    lines: set[int] = set()
    for node in _nodes_at(file.tree, file.text, offsets):
        texts = [expression for expression, _ in _in_code(node, pattern)]
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Assign):
            sides = [*node.targets, node.value]
        else:
            sides = []
        if {"__name__", "__module__"} & {getattr(side, "id", getattr(side, "attr", "")) for side in sides}:
            texts += [side for side in sides if _is_match(side, pattern)]
        lines.update(expression.lineno for expression in texts)
    return tuple(sorted(lines))


def _is_match(node: ast.expr, pattern: re.Pattern[str]) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(pattern.match(node.value))


def _in_code(node: ast.AST, pattern: re.Pattern[str]) -> Iterator[tuple[ast.expr, str]]:
    """Texts that a call runs or looks up and that a pattern is found in, each with the pattern's first group."""
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in _RUN:
        for argument in node.args:
            leading = first_literal(argument)
            if leading and (match := pattern.search(leading[1])):
                yield argument, match[1]


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
            if isinstance(value, ast.Constant) and str(value.value).isidentifier() and _compares(node):
                yield value, str(value.value)
            match = _NAME.fullmatch(leading[1]) if leading else None
            if leading and match:
                yield leading[0], match[1]


def _compares(node: ast.AST) -> bool:
    """True where a namespace alone may be compared with what an operator says of itself."""
    return isinstance(node, ast.Compare | ast.MatchValue) or (
        isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "removeprefix")
    )


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
