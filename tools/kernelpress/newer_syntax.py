"""Syntax that is newer than the oldest Python, where Python's own parser lets it pass.

``ast.parse(feature_version=...)`` refuses most of it, but neither a star in a subscript or an annotation (3.11) nor
what f-strings may hold since 3.12. An older Python than that refuses such an f-string by itself.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator

from kernelpress.text import Text

_STAR = re.compile(rb"[\[,:]\s*\*")
_FORMATTED = re.compile(rb"\b(?:f|fr|rf)['\"]", re.IGNORECASE)


def newer_syntax(data: bytes, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines with syntax that Python 3.10 does not know, and what it is."""
    if _STAR.search(data):
        yield from _stars(tree, Text(data))
    if sys.version_info >= (3, 12) and _FORMATTED.search(data):
        yield from _formatted(data)


def _stars(tree: ast.Module, text: Text) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and _is_bare(node.slice, text):
            yield node.slice.lineno, "a star in a subscript, outside of parentheses"
        elif isinstance(node, ast.arg) and isinstance(node.annotation, ast.Starred):
            yield node.annotation.lineno, "a star in an annotation"


def _is_bare(index: ast.expr, text: Text) -> bool:
    """Whether a subscript's index holds a star and is a tuple only for its commas."""
    if not isinstance(index, ast.Tuple) or not any(isinstance(each, ast.Starred) for each in index.elts):
        return False
    start, end = text.span(index)
    try:
        # The tree of `x[*y]` is that of `x[(*y,)]`; as arguments, one is a tuple and the other is not.
        call = ast.parse(b"f(" + text.data[start:end] + b"\n)", mode="eval").body
    except SyntaxError:
        return True  # `x[1:2, *y]`: slices stand in no parentheses
    return not (isinstance(call, ast.Call) and len(call.args) == 1 and isinstance(call.args[0], ast.Tuple))


def _formatted(data: bytes) -> Iterator[tuple[int, str]]:
    """What the fields of f-strings hold and did not before 3.12: their own quotes, backslashes, comments, lines."""
    quotes: list[str] = []
    source = io.StringIO(data.decode("utf-8-sig"), newline="")
    for token in tokenize.generate_tokens(source.readline):
        kind = tokenize.tok_name[token.type]
        # The text of the innermost literal is in no field of it.
        around = quotes[:-1] if kind in ("FSTRING_MIDDLE", "FSTRING_END") else quotes
        for quote in around:
            if kind == "COMMENT":
                yield token.start[0], "a comment in an f-string"
            elif "\\" in token.string:
                yield token.start[0], "a backslash in a field of an f-string"
            elif quote in token.string:
                yield token.start[0], "the quotes of an f-string in a field of it"
            elif "\n" in token.string and len(quote) == 1:
                yield token.start[0], "a line's end in a field of an f-string"
            else:
                continue
            break
        if kind == "FSTRING_START":
            quotes.append(token.string.lstrip("fFrR"))
        elif kind == "FSTRING_END":
            quotes.pop()
