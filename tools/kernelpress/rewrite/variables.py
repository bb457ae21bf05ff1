"""Variables that hold what is written at certain places of a package, and the statements that use them."""

from __future__ import annotations

import ast
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence

from kernelpress.syntax.scopes import Module, ScopedVisitor
from kernelpress.syntax.source_file import SourceFile


def words_pattern(words: Collection[str]) -> re.Pattern[bytes]:
    """Any of some words as a whole; bytes beyond ASCII are letters."""
    alternatives = b"|".join(re.escape(word.encode("utf-8")) for word in sorted(words))
    return re.compile(rb"(?<![\w\x80-\xff])(?:%s)(?![\w\x80-\xff])" % alternatives)


def variables_at(modules: Sequence[Module], offsets: Mapping[str, Sequence[int]]) -> set[str]:
    """Names of variables that get their values at some offsets of files, and of those that get theirs from them.

    Args:
        modules: The package's modules.
        offsets: Offsets in order, by the path of the file.
    """
    variables: set[str] = set()
    names = {name for module in modules for name in _assigned(module.file, offsets.get(module.file.path, ()))}
    while names:
        variables |= names
        pattern = words_pattern(names)
        names = {
            name
            for module in modules
            for name in _assigned(
                module.file, [match.start() for match in pattern.finditer(module.file.data)]
            )
        } - variables
    return variables


def _assigned(file: SourceFile, offsets: Sequence[int]) -> Iterator[str]:
    """Variables that are assigned or imported by statements at some offsets, and parameters with defaults there."""
    for node in nodes_at(file, offsets) if offsets else ():
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname for alias in node.names if alias.asname)
        elif isinstance(node, ast.arguments):
            defaults = [default for default in (*node.defaults, *node.kw_defaults) if default]
            spans = map(file.text.span, defaults)
            if any(start <= offset < end for start, end in spans for offset in offsets):
                yield from (parameter.arg for parameter in (*node.posonlyargs, *node.args, *node.kwonlyargs))


def nodes_at(file: SourceFile, offsets: Sequence[int]) -> Iterator[ast.AST]:
    """The nodes of a tree, without statements that hold none of some offsets: most of it, and most of the time."""
    pending: list[ast.AST] = [file.tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.stmt):
            start, end = _span(file, node)
            index = bisect_left(offsets, start)
            if index == len(offsets) or offsets[index] >= end:
                continue
        yield node
        pending.extend(ast.iter_child_nodes(node))


def body_span(file: SourceFile, statement: ast.stmt) -> tuple[int, int]:
    """The range of a function's or class's body."""
    return _span(file, statement.body[0])[0], file.text.span(statement)[1]  # type: ignore[attr-defined]


def _span(file: SourceFile, statement: ast.stmt) -> tuple[int, int]:
    """The range of a statement with its decorators, which stand before it."""
    first = next(iter(getattr(statement, "decorator_list", ())), statement)
    return file.text.span(first)[0], file.text.span(statement)[1]


class WordVisitor(ScopedVisitor):
    """Visits a module's tree without the statements that hold none of some words: most of it, and most of the time."""

    def __init__(self, module: Module, words: re.Pattern[bytes] | None) -> None:
        super().__init__(module)
        self.words = words

    def visit(self, node: ast.AST) -> None:
        """Visit a node, or leave it out; without words, visit all."""
        if not isinstance(node, ast.stmt) or self.has_words(*_span(self.module.file, node)):
            super().visit(node)

    def has_words(self, start: int, end: int) -> bool:
        """True if a range of the file holds one of the words."""
        return self.words is None or self.words.search(self.module.file.data, start, end) is not None

    def visit_body(self, node: ast.AST, body: Sequence[ast.AST]) -> None:
        """Visit the body of a function or class, if it holds any of the words and not its head alone."""
        if not isinstance(node, ast.stmt) or self.has_words(*body_span(self.module.file, node)):
            super().visit_body(node, body)
