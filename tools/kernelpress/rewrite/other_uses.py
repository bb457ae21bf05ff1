"""Uses of variables that hold a namespace or an operator's name for something else than to name an operator."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise

from kernelpress.rewrite.op_references import OpReferences
from kernelpress.rewrite.references import Mention, Problem
from kernelpress.rewrite.resolve import Resolver
from kernelpress.syntax.expressions import text_pieces
from kernelpress.syntax.scopes import Module, ScopedVisitor

# A variable that is assigned a name or the beginning of one.
_ASSIGNED = re.compile(rb"(?<!\w)(\w+)\s*(?::\s*\w+\s*)?=\s*\(?\s*[A-Za-z]*[\"']+\w+(?:::\w+)?[\"']")
_NAME = re.compile(r"(\w+)::\w+(?:\.\w+)?")
_SHARED = (
    "this takes a namespace of operators for something else, which would get the name that the build gives it",
    "write the string out here, or give the variable for operators a string of its own",
)


def find_other_uses(resolver: Resolver, operators: OpReferences, own: set[str]) -> dict[str, list[Mention]]:
    """Find operators' names that are compared by a variable, by file; uses of a shared namespace become problems."""
    if not own:
        return {}
    words = {
        match[1]
        for module in resolver.modules.values()
        if any(name.encode() in module.file.data for name in own)
        for match in _ASSIGNED.finditer(module.file.data)
        if any(f"{quote}{name}".encode() in match[0] for name in own for quote in "\"'")
    }
    mentions: dict[str, list[Mention]] = {}
    count = 0
    while count != (count := len(words)):
        names = b"|".join(sorted(words))
        renamed = re.compile(rb"(?<!\w)(\w+)\s*=\s*[\w.]*\b(?:%s)\b|\b(?:%s)\s+as\s+(\w+)" % (names, names))
        for module in resolver.modules.values():
            words |= {match[1] or match[2] for match in renamed.finditer(module.file.data)}
    if words:
        pattern = re.compile(rb"\b(?:%s)\b" % b"|".join(sorted(words)))
        for module in resolver.modules.values():
            if pattern.search(module.file.data):
                visitor = _UseVisitor(module, resolver, operators, own, pattern)
                visitor.visit(module.file.tree)
                mentions[module.file.path] = visitor.mentions
    return mentions


class _UseVisitor(ScopedVisitor):
    def __init__(
        self,
        module: Module,
        resolver: Resolver,
        operators: OpReferences,
        own: set[str],
        words: re.Pattern[bytes],
    ) -> None:
        super().__init__(module)
        self.resolver = resolver
        self.operators = operators
        self.own = own
        self.words = words
        # Names where the new namespace is right: one operator's name, or another variable.
        self.passed: set[int] = set()
        self.mentions: list[Mention] = []

    def visit(self, node: ast.AST) -> None:
        """Leave out statements without any of the words."""
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            start, end = self.module.file.text.span(node)
            if not self.words.search(self.module.file.data, start, end):
                return
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            self.passed.add(id(node.value))
        elif isinstance(node, ast.expr):
            pieces = text_pieces(node)
            self.passed.update(id(first) for first, second in pairwise(pieces) if _colons(second))
            parts = list(_looked_up(node))
            for part in parts:
                self.compare(part)
            if (
                isinstance(node, ast.Compare)
                or getattr(getattr(node, "func", None), "attr", "") == "startswith"
            ):
                self.passed.update(map(id, parts))
            if isinstance(node, ast.Name | ast.Attribute):
                self.use(node)
        super().visit(node)

    def compare(self, node: ast.expr) -> None:
        """Note an operator's name that stays as it is where it is compared or looked up."""
        literal, scope = self.resolver.constant(node, self.scope)
        text = literal.value if isinstance(literal, ast.Constant) else None
        match = _NAME.fullmatch(text) if isinstance(text, str) and literal is not node else None
        if match and scope.module.file.text.literal(literal, match[1]) not in {
            reference.start for reference in self.operators.references.get(scope.module.file.path, ())
        }:
            self.mentions.append(Mention(node.lineno, match[1]))

    def use(self, node: ast.Name | ast.Attribute) -> None:
        if not isinstance(node.ctx, ast.Load) or {id(node)} & (self.passed | self.operators.named):
            return
        literal = self.resolver.constant(node, self.scope)[0]
        if id(literal) in self.operators.namespaces and ast.literal_eval(literal) in self.own:
            problems = self.operators.problems.setdefault(self.module.file.path, [])
            problems.append(Problem(node.lineno, *_SHARED))


def _looked_up(node: ast.expr) -> Iterator[ast.expr]:
    """The expressions that one compares or looks up."""
    if isinstance(node, ast.Compare):
        for side in (node.left, *node.comparators):
            yield from side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
    elif isinstance(node, ast.Subscript):
        yield node.slice
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("get", "startswith"):
        yield from node.args[:1]
    elif isinstance(node, ast.Dict):
        yield from (key for key in node.keys if key is not None)


def _colons(piece: ast.expr) -> bool:
    return isinstance(piece, ast.Constant) and str(piece.value).startswith("::")
