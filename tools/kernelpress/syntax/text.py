"""A Python source as bytes: the offsets of its syntax tree's nodes, and edits to it."""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass

# Levels of nested syntax. Python's parser allows no more open brackets than this, either.
MOST_NESTED = 200

_BOM = b"\xef\xbb\xbf"
_NEWLINE = re.compile(rb"\r\n|\r|\n")
_QUOTE = re.compile(rb"[A-Za-z]*('''|\"\"\"|'|\")")


@dataclass(frozen=True)
class Edit:
    """New text for a range of bytes; ``None`` for text stands for the op namespace."""

    start: int
    end: int
    text: bytes | None


class SourceText:
    """A source and its lines. Python counts columns in bytes of UTF-8, so no decoding comes in between."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.lines = [0, *(match.end() for match in _NEWLINE.finditer(data))]
        if data.startswith(_BOM):
            self.lines[0] = len(_BOM)

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """The range of bytes of a node."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def at(self, line: int, column: int) -> int:
        """The offset of a line (from 1) and a column (in bytes, from 0)."""
        return self.lines[line - 1] + column

    def line_of(self, offset: int) -> int:
        """The line (from 1) that a byte stands in."""
        return 1 + len(_NEWLINE.findall(self.data, 0, offset))

    def newlines(self, start: int, end: int) -> list[bytes]:
        """The line ends within a range."""
        return _NEWLINE.findall(self.data[start:end])

    def literal(self, node: ast.expr, text: str) -> int | None:
        """The offset of ``text`` in a string literal that starts with it; ``None`` if it is not written plainly."""
        start = self.span(node)[0]
        quote = _QUOTE.match(self.data, start)
        if quote is not None and self.data.startswith(text.encode("utf-8"), quote.end()):
            return quote.end()
        return None


def parse(data: bytes, filename: str = "<source>") -> ast.Module:
    """The syntax tree of a Python source, without the warnings that the author gets from Python anyway.

    Raises:
        SyntaxError: This is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(data, filename)


def nesting(tree: ast.Module) -> tuple[int | None, int]:
    """The line at which syntax is nested the deepest, and how deep that is, as far as it may pass ``MOST_NESTED``."""
    depth, line = 0, None
    level: list[tuple[ast.AST, int | None]] = [(tree, None)]
    while level:
        depth, line = depth + 1, level[0][1]
        following: list[tuple[ast.AST, int | None]] = []
        for node, at in level:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr | ast.stmt):
                    # Each level takes a byte of the source at least, so what is short cannot be deep.
                    one_line = child.lineno == child.end_lineno
                    if one_line and depth + (child.end_col_offset or 0) - child.col_offset < MOST_NESTED:
                        continue
                    at = child.lineno
                following.append((child, at))
        level = following
    return line, depth
