"""Uses of variables that hold a namespace or an operator's name for something else than to name an operator."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise

from kernelpress.rewrite.op_references import OpReferences
from kernelpress.rewrite.references import Mention, Problem
from kernelpress.rewrite.resolve import Resolver
from kernelpress.syntax.expressions import first_literal, text_pieces
from kernelpress.syntax.scopes import Binding, Module, Scope, ScopedVisitor

_NAME = re.compile(r"(\w+)::\w+(?:\.\w+)?")
_SHARED = (
    "this takes a namespace of operators for something else, which would get the name that the build gives it",
    "write the string out here, or give the variable for operators a string of its own",
)


def find_other_uses(resolver: Resolver, operators: OpReferences, own: set[str]) -> dict[str, list[Mention]]:
    """Find operators' names that are compared by a variable, by file; uses of a shared namespace become problems."""
    if not own:
        return {}
    starts = tuple(own)
    bindings = [pair for module in resolver.modules.values() for pair in _bindings(module.scope)]
    words = {
        name
        for name, binding in bindings
        if _begins_with(binding, starts) or id(binding) in operators.parameters
    }
    count = 0
    while count != (count := len(words)):
        words |= {name for name, binding in bindings if _last_name(binding) in words}
    mentions: dict[str, list[Mention]] = {}
    if words:
        pattern = re.compile(rb"\b(?:%s)\b" % b"|".join(sorted(word.encode("utf-8") for word in words)))
        for module in resolver.modules.values():
            if pattern.search(module.file.data):
                visitor = _UseVisitor(module, resolver, operators, own, pattern)
                visitor.visit(module.file.tree)
                mentions[module.file.path] = visitor.mentions
    return mentions


def _bindings(scope: Scope) -> Iterator[tuple[str, Binding]]:
    """All names of a scope and those within it, each with what it is bound to."""
    for name, values in scope.bindings.items():
        for binding in values:
            yield name, binding
            if isinstance(binding, ast.stmt):
                yield from _bindings(scope.module.within(binding, scope))


def _begins_with(binding: Binding, starts: tuple[str, ...]) -> bool:
    leading = first_literal(binding) if isinstance(binding, ast.expr) else None
    return leading is not None and leading[1].startswith(starts)


def _last_name(binding: Binding) -> str:
    """The variable that another is assigned or imported from; empty for all else."""
    if isinstance(binding, str):
        return binding.rpartition(".")[2]
    if isinstance(binding, ast.Name):
        return binding.id
    return binding.attr if isinstance(binding, ast.Attribute) else ""


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
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if all(isinstance(target, ast.Name) for target in targets):
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
        value, scope = self.resolver.constant(node, self.scope)
        bound = scope.lookup(value.id) if isinstance(value, ast.Name) else None
        if (id(value) in self.operators.namespaces and ast.literal_eval(value) in self.own) or (
            bound is not None and any(id(binding) in self.operators.parameters for binding in bound[1])
        ):
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
