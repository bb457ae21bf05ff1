"""What a name in a Python source stands for: imports followed through aliases, scopes and shadowing."""

from __future__ import annotations

import ast
from collections.abc import Iterator

_Scope = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.expr
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Of a function or a class, what belongs to the scope around it.
_OUTSIDE = ("decorator_list", "args", "returns", "bases", "keywords")
# The full name of an import (relative ones with their dots), an expression, a function or class, or something else.
Binding = str | ast.expr | ast.stmt | None
# What variables are known to stand for while an expression is looked at.
Known = dict[int, frozenset[str]]


class ScopedVisitor(ast.NodeVisitor):
    """Visits a tree and knows at each node what names mean there.

    ``walrus`` is whether the source holds assignments within expressions; it is faster not to look for them.
    """

    def __init__(self, *, walrus: bool = True) -> None:
        self.scopes: list[ast.AST] = []
        self.walrus = walrus
        self._bound: dict[int, dict[str, list[Binding]]] = {}

    def names(self, node: ast.AST, _known: Known | None = None) -> frozenset[str]:
        """Full dotted names that an expression may stand for, such as ``torch.library.custom_op``."""
        known = {} if _known is None else _known
        if isinstance(node, ast.Attribute):
            return frozenset(f"{name}.{node.attr}" for name in self.names(node.value, known))
        if isinstance(node, ast.Call):
            return self._names_of_call(node, known)
        if isinstance(node, ast.IfExp | ast.BoolOp | ast.NamedExpr):
            return frozenset(name for each in choices(node) for name in self.names(each, known))
        if not isinstance(node, ast.Name):
            return frozenset()
        bindings = self.bound(node.id)
        if bindings is None:
            # What nothing binds but PyTorch is called by came with an import of everything.
            return frozenset(("torch" if node.id == "torch" else f"builtins.{node.id}",))
        # Once for each variable: what is assigned over and over from one another would take forever.
        key = id(bindings)
        if key not in known:
            known[key] = frozenset()
            for each in bindings:
                if each is not None:
                    known[key] |= {each} if isinstance(each, str) else self.names(each, known)
        return known[key]

    def _names_of_call(self, call: ast.Call, known: Known) -> frozenset[str]:
        """What ``getattr`` looks up, and what ``functools.partial`` passes on without arguments of its own."""
        called = self.names(call.func, known) if call.args else frozenset()
        if "functools.partial" in called and len(call.args) == 1:
            return self.names(call.args[0], known)
        if "builtins.getattr" not in called or len(call.args) < 2:
            return frozenset()
        wanted = call.args[1].value if isinstance(call.args[1], ast.Constant) else None
        attribute = wanted if isinstance(wanted, str) else None
        found = self.names(call.args[0], known) if attribute else ()
        default = self.names(call.args[2], known) if len(call.args) > 2 else ()
        return frozenset((*(f"{name}.{attribute}" for name in found), *default))

    def bound(self, name: str) -> list[Binding] | None:
        """All that a name is bound to in the innermost scope that binds it; ``None`` where none does."""
        for depth, scope in enumerate(reversed(self.scopes)):
            if isinstance(scope, ast.ClassDef) and depth:
                continue
            if id(scope) not in self._bound:
                self._bound[id(scope)] = _bindings(scope, self.walrus)
            if name in self._bound[id(scope)]:
                return self._bound[id(scope)][name]
        return None

    def bound_here(self) -> tuple[str, ...]:
        """All names that the innermost scope binds; ``*`` for an import of everything."""
        scope = self.scopes[-1]
        if id(scope) not in self._bound:
            self._bound[id(scope)] = _bindings(scope, self.walrus)
        return tuple(self._bound[id(scope)])

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


def choices(node: ast.expr) -> list[ast.expr]:
    """The expressions one of which is an expression's value: those of a condition, of ``or`` and ``and``, or itself."""
    if isinstance(node, ast.IfExp):
        return [*choices(node.body), *choices(node.orelse)]
    if isinstance(node, ast.BoolOp):
        return [each for value in node.values for each in choices(value)]
    if isinstance(node, ast.NamedExpr):
        return choices(node.value)
    return [node]


def assigned(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.Name, ast.expr]]:
    """The names that an assignment binds to an expression each, through tuples on both sides."""
    if isinstance(target, ast.Name):
        yield target, value
    elif (
        isinstance(target, ast.Tuple | ast.List)
        and isinstance(value, ast.Tuple | ast.List)
        and len(target.elts) == len(value.elts)
        and not any(isinstance(each, ast.Starred) for each in (*target.elts, *value.elts))
    ):
        for inner, part in zip(target.elts, value.elts, strict=True):
            yield from assigned(inner, part)


def _bindings(scope: ast.AST, walrus: bool) -> dict[str, list[Binding]]:
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
                if node.value is None:
                    whole.add(id(target))
                    continue
                for name, value in assigned(target, node.value):
                    whole.add(id(name))
                    found.setdefault(name.id, []).append(value)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            # Loops, unpacking, `with` and `+=`: not one expression's value.
            found.setdefault(node.id, []).extend([None] * (id(node) not in whole))
        elif isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            found.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            found.setdefault(node.name, []).append(None)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            found.setdefault(node.rest, []).append(None)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            elsewhere.update(node.names)
    if walrus and not isinstance(scope, _COMPREHENSIONS):
        for named in _named(scope):
            found.setdefault(named.target.id, []).append(named.value)
    return {name: bound for name, bound in found.items() if name not in elsewhere}


def _named(scope: ast.AST) -> Iterator[ast.NamedExpr]:
    """Assignments within the expressions of a scope; a comprehension's are those of the scope around it."""
    pending = _listed(getattr(scope, "body", None))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.NamedExpr):
            yield node
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Lambda)):
            pending.extend(each for name in _OUTSIDE for each in _listed(getattr(node, name, None)))
        else:
            pending.extend(ast.iter_child_nodes(node))


def _listed(value: ast.AST | list[ast.AST] | None) -> list[ast.AST]:
    return [*value] if isinstance(value, list) else [] if value is None else [value]


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
