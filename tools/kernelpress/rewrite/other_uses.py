"""Uses of variables that hold a namespace or an operator's name for something else than to name an operator."""

from __future__ import annotations

import ast
import re
from itertools import pairwise, takewhile

from kernelpress.rewrite.references import OpReferences, Problem
from kernelpress.rewrite.resolve import Resolver
from kernelpress.rewrite.unresolved import TESTS, compared, shows
from kernelpress.rewrite.variables import WordVisitor, variables_at, words_pattern
from kernelpress.syntax.expressions import text_pieces
from kernelpress.syntax.scopes import Module

_SHARED = (
    "this takes a namespace of operators for something else, which would get the name that the build gives it",
    "write the string out here, or give the variable for operators a string of its own",
)
_RENAMED = (
    "this takes an operator's name for something else; in the build the name begins with another namespace",
    "write a string of its own here if it must stay, or leave it if all that it meets is the operator's name as well",
)


def find_other_uses(resolver: Resolver, operators: OpReferences, own: set[str]) -> None:
    """Find uses of variables for something else than operators, which become problems of ``operators``.

    A namespace that is used so is an error, an operator's name a warning: it may be right, such as for the key of a
    table in which an operator's own name is looked up.
    """
    modules = list(resolver.modules.values())
    offsets = {path: sorted(starts) for path, starts in operators.variables.items()}
    variables = variables_at(modules, offsets) if own else set()
    variables |= operators.parameter_names
    if not (own and variables):
        return
    words = words_pattern(variables)
    for module in modules:
        if words.search(module.file.data):
            _UseVisitor(module, resolver, operators, own, words).visit(module.file.tree)


class _UseVisitor(WordVisitor):
    def __init__(
        self,
        module: Module,
        resolver: Resolver,
        operators: OpReferences,
        own: set[str],
        words: re.Pattern[bytes],
    ) -> None:
        super().__init__(module, words)
        self.resolver = resolver
        self.operators = operators
        self.own = own
        # Names where the new namespace is right: one operator's name, or another variable.
        self.passed: set[int] = set(operators.named)

    def visit(self, node: ast.AST) -> None:
        """Leave out what is only shown."""
        if isinstance(node, ast.Raise) or (isinstance(node, ast.expr) and shows(node)):
            return
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if all(isinstance(target, ast.Name) for target in targets):
                self.passed.add(id(node.value))
        for value in compared(node):
            elements = value.elts if isinstance(value, ast.Tuple | ast.List | ast.Set) else [value]
            self.passed.update(map(id, elements))
        if isinstance(node, ast.Attribute) and node.attr in TESTS:
            self.passed.add(id(node.value))
        if isinstance(node, ast.expr):
            pieces = text_pieces(node)
            self.passed.update(id(first) for first, second in pairwise(pieces) if _colons(second))
            if id(node) not in self.passed and (
                len(pieces) > 1 or isinstance(getattr(node, "ctx", None), ast.Load)
            ):
                self.use(node)
        super().visit(node)

    def use(self, node: ast.expr) -> None:
        pieces = self.resolver.text_pieces(node, self.scope)
        first, scope = pieces[0] if pieces else (node, self.scope)
        parameter = scope.parameter(first.id) if isinstance(first, ast.Name) else None
        if parameter is not None:
            kind = self.operators.parameters.get(id(parameter[1]))
            if kind == "namespace" and len(pieces) > 1:
                kind = "operator" if _colons(pieces[1][0]) else None
        else:
            literals = takewhile(lambda piece: isinstance(piece[0], ast.Constant), pieces)
            text = "".join(str(piece.value) for piece, _ in literals if isinstance(piece, ast.Constant))
            namespace, colons, _ = text.partition("::")
            file = scope.module.file
            if namespace not in self.own or not isinstance(first, ast.Constant):
                return
            if file.text.literal(first, namespace) not in self.operators.variables.get(file.path, ()):
                return
            kind = "operator" if colons else "namespace"
        if kind is not None:
            problem = (
                Problem(node.lineno, *_SHARED)
                if kind == "namespace"
                else Problem(node.lineno, *_RENAMED, "warning")
            )
            self.operators.problem(self.module.file.path, problem)


def _colons(piece: ast.expr) -> bool:
    return isinstance(piece, ast.Constant) and str(piece.value).startswith("::")
