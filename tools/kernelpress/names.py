"""What a name in a Python source stands for: imports followed through aliases, scopes and shadowing."""

from __future__ import annotations

import ast
from collections.abc import Iterator

_Scope = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.expr
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_Binding = (
    str | ast.expr | None
)  # the full name of an import, an expression that may be one, or something else


class ScopedVisitor(ast.NodeVisitor):
    """Visits a tree and knows at each node what names mean there."""

    def __init__(self) -> None:
        self.scopes: list[ast.AST] = []
        self._bound: dict[int, dict[str, list[_Binding]]] = {}

    def names(self, node: ast.AST, _seen: frozenset[int] = frozenset()) -> frozenset[str]:
        """Full dotted names that an expression may stand for, such as ``torch.library.custom_op``."""
        if isinstance(node, ast.Attribute):
            return frozenset(f"{name}.{node.attr}" for name in self.names(node.value, _seen))
        if not isinstance(node, ast.Name) or id(node) in _seen:
            return frozenset()
        for depth, scope in enumerate(reversed(self.scopes)):
            if isinstance(scope, ast.ClassDef) and depth:
                continue
            if id(scope) not in self._bound:
                self._bound[id(scope)] = _bindings(scope)
            bindings = self._bound[id(scope)]
            if node.id in bindings:
                found: set[str] = set()
                for each in bindings[node.id]:
                    if isinstance(each, str):
                        found.add(each)
                    elif each is not None:
                        found |= self.names(each, _seen | {id(node)})
                return frozenset(found)
        return frozenset((f"builtins.{node.id}",))

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


def _bindings(scope: ast.AST) -> dict[str, list[_Binding]]:
    found: dict[str, list[_Binding]] = {}
    elsewhere: set[str] = set()
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
                full = f"{'.' * node.level}{node.module or ''}.{alias.name}"
                found.setdefault(alias.asname or alias.name, []).append(full)
        elif (
            isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        ):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            found.setdefault(node.id, [])
        elif isinstance(node, (*_FUNCTIONS, ast.ClassDef)) or (
            isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name
        ):
            found.setdefault(str(node.name), []).append(None)
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
