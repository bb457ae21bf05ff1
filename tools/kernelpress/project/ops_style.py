"""Operators of a fixed namespace, named through ``_ops`` instead."""

from __future__ import annotations

import ast
import re

from kernelpress.syntax.text import Edit, SourceText, parse


def to_ops_style(data: bytes, namespace: str, depth: int) -> bytes:
    """Take a namespace that stands in a source from ``_ops`` of the package.

    ``"ns::op"`` becomes ``add_op_namespace_prefix("op")``, ``torch.ops.ns`` becomes ``ops``, and the name of the
    namespace itself ``add_op_namespace_prefix("")`` without its colons. No line moves.

    Args:
        data: The source, with ``namespace`` nowhere but where operators are named.
        namespace: The namespace.
        depth: How many folders below the package's top the file stands.
    """
    text, tree = SourceText(data), parse(data)
    edits: list[Edit] = []
    names = set()
    for node in ast.walk(tree):
        chain = isinstance(node, ast.Attribute) and node.attr == namespace
        looked_up = isinstance(node, ast.Call) and len(node.args) == 2 and _is(node.args[1], namespace)
        if chain or looked_up:
            assert isinstance(node, ast.expr)
            edits.append(Edit(*text.span(node), b"_kernel_ops"))
            names.add("ops as _kernel_ops")
    taken = [(edit.start, edit.end) for edit in edits]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant | ast.JoinedStr):
            continue
        start, end = text.span(node)
        if any(first <= start < last for first, last in taken):
            continue
        segment = data[start:end]
        if _is(node, namespace):
            edits.append(Edit(start, end, b'_kernel_op("").partition("::")[0]'))
            names.add("add_op_namespace_prefix as _kernel_op")
        elif re.match(rb"[A-Za-z]*['\"]+" + namespace.encode() + rb"::", segment):
            rest = segment.replace(namespace.encode() + b"::", b"", 1)
            edits.append(Edit(start, end, b"_kernel_op(" + rest + b")"))
            names.add("add_op_namespace_prefix as _kernel_op")
    for edit in sorted(edits, key=lambda edit: -edit.start):
        data = data[: edit.start] + (edit.text or b"") + data[edit.end :]
    if not names:
        return data
    line = f"from {'.' * (depth + 1)}_ops import {', '.join(sorted(names))}; ".encode()
    return _before_code(data, line)


def _is(node: ast.AST, text: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == text


def _before_code(data: bytes, line: bytes) -> bytes:
    """Put an import on the line of the first import that is not of the future, before it."""
    tree, text = parse(data), SourceText(data)
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not docstring and not future and not hasattr(node, "body"):
            at = text.span(node)[0]
            return data[:at] + line + data[at:]
    return line.rstrip(b"; ") + b"\n" + data
