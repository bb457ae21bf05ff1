"""What a name in a Python source stands for: imports followed through aliases, scopes and shadowing."""

from __future__ import annotations

import ast
from collections.abc import Iterator

_Scope = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.expr
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# The full name of an import (relative ones with their dots), an expression, a function or class, or something else.
Binding = str | ast.expr | ast.stmt | None


class ScopedVisitor(ast.NodeVisitor):
    """Visits a tree and knows at each node what names mean there."""

    def __init__(self) -> None:
        self.scopes: list[ast.AST] = []
        self._bound: dict[int, dict[str, list[Binding]]] = {}

    def names(self, node: ast.AST, _seen: frozenset[int] = frozenset()) -> frozenset[str]:
        """Full dotted names that an expression may stand for, such as ``torch.library.custom_op``."""
        if isinstance(node, ast.Attribute):
            return frozenset(f"{name}.{node.attr}" for name in self.names(node.value, _seen))
        if isinstance(node, ast.Call) and len(node.args) >= 2:
            attribute = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            if not isinstance(node.func, ast.Name) or not isinstance(attribute, str):
                return frozenset()
            looked_up = "builtins.getattr" in self.names(node.func, _seen)
            found = self.names(node.args[0], _seen) if looked_up else ()
            return frozenset(f"{name}.{attribute}" for name in found)
        if not isinstance(node, ast.Name) or id(node) in _seen:
            return frozenset()
        bindings = self.bound(node.id)
        if bindings is None:
            return frozenset((f"builtins.{node.id}",))
        names: set[str] = set()
        for each in bindings:
            if isinstance(each, str):
                names.add(each)
            elif each is not None:
                names |= self.names(each, _seen | {id(node)})
        return frozenset(names)

    def bound(self, name: str) -> list[Binding] | None:
        """All that a name is bound to in the innermost scope that binds it; ``None`` where none does."""
        for depth, scope in enumerate(reversed(self.scopes)):
            if isinstance(scope, ast.ClassDef) and depth:
                continue
            if id(scope) not in self._bound:
                self._bound[id(scope)] = _bindings(scope)
            if name in self._bound[id(scope)]:
                return self._bound[id(scope)][name]
        return None

    def visit_Module(self, node: ast.Module) -> None:
        """The outermost scope."""
        self.within(node, node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Decorators, defaults and annotations belong to the scope around the function."""
        for outside in (*node.decorator_list, node.args, node.returns):
            if outside is not None:
                self.visit(outside)
        self.within(node, node.body)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        """As any function."""
        self.visit_FunctionDef(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Likewise."""
        self.visit(node.args)
        self.within(node, [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """What a class derives from belongs to the scope around it."""
        for outside in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(outside)
        self.within(node, node.body)

    def generic_visit(self, node: ast.AST) -> None:
        """Comprehensions are scopes too."""
        if isinstance(node, _COMPREHENSIONS) and (not self.scopes or self.scopes[-1] is not node):
            self.scopes.append(node)
            super().generic_visit(node)
            self.scopes.pop()
        else:
            super().generic_visit(node)

    def within(self, scope: ast.AST, body: list[ast.stmt] | list[ast.expr]) -> None:
        """Visit the inside of a scope."""
        self.scopes.append(scope)
        for each in body:
            self.visit(each)
        self.scopes.pop()


def _bindings(scope: ast.AST) -> dict[str, list[Binding]]:
    found: dict[str, list[Binding]] = {}
    elsewhere: set[str] = set()
    whole: set[int] = set()
    if isinstance(scope, (*_FUNCTIONS, ast.Lambda)):
        arguments = scope.args
        for each in (
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
            arguments.vararg,
            arguments.kwarg,
        ):
            if each is not None:
                found.setdefault(each.arg, []).append(None)
    for node in _inside(scope):
        if isinstance(node, ast.Import):
            for alias in node.names:
                full = alias.name if alias.asname else alias.name.partition(".")[0]
                found.setdefault(alias.asname or full, []).append(full)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                source = f"{'.' * node.level}{node.module or ''}"
                full = f"{source}.{alias.name}" if node.module else f"{source}{alias.name}"
                found.setdefault(alias.asname or alias.name, []).append(full)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    whole.add(id(target))
                    if node.value is not None:
                        found.setdefault(target.id, []).append(node.value)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            # Loops, unpacking, `with` and `+=`: not one expression's value.
            found.setdefault(node.id, []).extend([None] * (id(node) not in whole))
        elif isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            found.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            found.setdefault(node.name, []).append(None)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            elsewhere.update(node.names)
    return {name: bound for name, bound in found.items() if name not in elsewhere}


def _inside(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope, without what is inside of the scopes within it."""
    if isinstance(scope, ast.Lambda):
        pending: list[ast.AST] = [scope.body]
    elif isinstance(scope, _COMPREHENSIONS):
        pending = [each.target for each in scope.generators]
    else:
        pending = list(getattr(scope, "body", ()))
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case | ast.withitem | ast.pattern):
            # Of the expressions in a statement, targets alone bind names; ruling out the rest is most of the speed.
            if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
                pending.extend(
                    child
                    for child in ast.iter_child_nodes(node)
                    if not isinstance(child, ast.expr)
                    or isinstance(getattr(child, "ctx", None), ast.Store | ast.Del)
                )
        elif isinstance(node, ast.Tuple | ast.List | ast.Starred):
            pending.extend(ast.iter_child_nodes(node))
