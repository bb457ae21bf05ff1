"""Expressions that are text."""

from __future__ import annotations

import ast
import string
from itertools import takewhile

_FORMAT = string.Formatter()


def text_pieces(node: ast.expr) -> list[ast.expr]:
    """The expressions that a text is put together of, whichever way it is: ``+``, ``%``, ``format``, an f-string.

    A literal piece of a template is a constant at the template's place, and ``None`` is one that cannot be read. What
    is no such text is its only piece.
    """
    pieces: list[ast.expr | str | None]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*text_pieces(node.left), *text_pieces(node.right)]
    if isinstance(node, ast.JoinedStr):
        pieces = [_in_fstring(value) for value in node.values]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        arguments = node.right.elts if isinstance(node.right, ast.Tuple) else [node.right]
        pieces = _filled(_text(node.left), arguments)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        pieces = _formatted(_text(node.func.value), node)
    else:
        return [node]
    return [
        piece if isinstance(piece, ast.expr) else ast.copy_location(ast.Constant(piece), node)
        for piece in pieces
        if piece != ""
    ]


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _in_fstring(value: ast.expr) -> ast.expr | str | None:
    if isinstance(value, ast.FormattedValue):
        return value.value if value.conversion == -1 and value.format_spec is None else None
    return _text(value)


def _filled(template: str | None, arguments: list[ast.expr]) -> list[ast.expr | str | None]:
    """The pieces of ``template % arguments``, as far as each argument is put in as it is."""
    if template is None:
        return [None]
    first, *others = template.split("%s")
    if "%" in template.replace("%s", "") or len(others) != len(arguments):
        return [template.partition("%")[0], None]
    return [first, *(piece for pair in zip(arguments, others, strict=True) for piece in pair)]


def _formatted(template: str | None, call: ast.Call) -> list[ast.expr | str | None]:
    """The pieces of ``template.format(...)``, likewise."""
    arguments: dict[str | None, ast.expr] = {keyword.arg: keyword.value for keyword in call.keywords}
    if not any(isinstance(argument, ast.Starred) for argument in call.args):
        arguments |= {str(number): argument for number, argument in enumerate(call.args)}
    pieces: list[ast.expr | str | None] = []
    try:
        for number, (literal, field, spec, conversion) in enumerate(_FORMAT.parse(template or "{")):
            pieces.append(literal)
            if field is not None:
                pieces.append(None if spec or conversion else arguments.get(field or str(number)))
    except ValueError:
        return [None]
    return pieces


def first_literal(node: ast.expr) -> tuple[ast.expr, str] | None:
    """The literal that an expression's value begins with, and the text that is written out there."""
    literals = list(takewhile(lambda piece: _text(piece) is not None, text_pieces(node)))
    return (literals[0], "".join(str(_text(piece)) for piece in literals)) if literals else None


def is_text(node: ast.expr) -> bool:
    """True for a string, and for an expression that puts one together."""
    if isinstance(node, ast.JoinedStr | ast.BinOp) or _text(node) is not None:
        return True
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("format", "join", "replace")
    )


def argument_of(call: ast.Call, parameters: ast.arguments, name: str) -> ast.expr | None:
    """The argument that a call gives a parameter; ``None`` where it gives none, or that cannot be told."""
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return None
    names = [parameter.arg for parameter in (*parameters.posonlyargs, *parameters.args)]
    if name in names[: len(call.args)]:
        return call.args[names.index(name)]
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def default_of(parameters: ast.arguments, name: str) -> ast.expr | None:
    """The expression that a parameter has as its default; ``None`` where it has none, or ``None`` itself."""
    positional = [*parameters.posonlyargs, *parameters.args]
    pairs = [
        *zip(reversed(positional), reversed(parameters.defaults), strict=False),
        *zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True),
    ]
    default = next((default for parameter, default in pairs if parameter.arg == name), None)
    return None if isinstance(default, ast.Constant) and default.value is None else default


def unpacks(call: ast.Call) -> bool:
    """True if a call gets arguments out of a list or a dictionary."""
    return any(isinstance(argument, ast.Starred) for argument in call.args) or any(
        keyword.arg is None for keyword in call.keywords
    )
