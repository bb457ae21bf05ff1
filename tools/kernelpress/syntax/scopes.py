"""Scopes of a Python source, and what the names in each are bound to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from functools import cached_property

from kernelpress.syntax.source_file import SourceFile

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_REBINDING = re.compile(rb"\b(?:global|nonlocal)\b|:=")
# The full name of an import, an expression, a function or class, a parameter, or something that is only known at run
# time.
Binding = str | ast.expr | ast.stmt | ast.arg | None


class Module:
    """A Python file with its scopes; ``name`` is its dotted name in place."""

    def __init__(self, file: SourceFile, name: str) -> None:
        self.file = file
        self.name = name
        self.scope = Scope(self, file.tree, None)
        self._scopes: dict[int, Scope] = {id(file.tree): self.scope}

    def within(self, node: ast.AST, parent: Scope) -> Scope:
        """The scope that a function, class, lambda or comprehension opens."""
        scope = self._scopes.get(id(node))
        if scope is None:
            scope = self._scopes[id(node)] = Scope(self, node, parent)
        return scope

    def absolute(self, name: str | None, level: int) -> str | None:
        """The full name of what an import of this module takes from; ``None`` if it leaves the project."""
        if not level:
            return name or ""
        parts = self.name.split(".")
        # In a package's own ``__init__`` one dot is the package itself, elsewhere the package around the module.
        kept = len(parts) - level + self.file.path.endswith("__init__.py")
        return ".".join((*parts[:kept], *((name,) if name else ()))) if kept > 0 else None

    @cached_property
    def rebound(self) -> frozenset[str]:
        """Names that are assigned from within functions or expressions, so that no one binding tells their value."""
        if not _REBINDING.search(self.file.data):
            return frozenset()
        names: set[str] = set()
        for node in ast.walk(self.file.tree):
            if isinstance(node, ast.Global | ast.Nonlocal):
                names.update(node.names)
            elif isinstance(node, ast.NamedExpr):
                names.add(node.target.id)
        return frozenset(names)

    @cached_property
    def stars(self) -> tuple[str, ...]:
        """Full names of the modules that all names are imported from."""
        bindings = self.scope.bindings.get("*", ())
        return tuple(star.removesuffix(".*") for star in bindings if isinstance(star, str))


class Scope:
    """A module, function, class, lambda or comprehension, with the scope around it."""

    def __init__(self, module: Module, node: ast.AST, parent: Scope | None) -> None:
        self.module = module
        self.node = node
        self.parent = parent

    def lookup(self, name: str) -> tuple[Scope, list[Binding]] | None:
        """The innermost scope that binds a name, and all that it binds it to; ``None`` where none does."""
        scope: Scope | None = self
        while scope is not None:
            # Functions in a class do not see the class's names.
            if name in scope.bindings and (scope is self or not isinstance(scope.node, ast.ClassDef)):
                return scope, scope.bindings[name]
            scope = scope.parent
        return None

    def parameter(self, name: str) -> tuple[Scope, ast.arg] | None:
        """The parameter that a name stands for, with its function's scope; ``None`` for all else."""
        binding = self.lookup(name)
        if binding is None or len(binding[1]) != 1 or not isinstance(binding[1][0], ast.arg):
            return None
        return binding[0], binding[1][0]

    @cached_property
    def bindings(self) -> dict[str, list[Binding]]:
        """All that each name is bound to in this scope; under ``*`` the imports of everything."""
        bindings: dict[str, list[Binding]] = {}
        elsewhere: set[str] = set()
        for name, binding in self._bindings(elsewhere):
            bindings.setdefault(name, []).append(binding)
        for name in self.module.rebound & bindings.keys():
            bindings[name].append(None)
        return {name: values for name, values in bindings.items() if name not in elsewhere}

    def _bindings(self, elsewhere: set[str]) -> Iterator[tuple[str, Binding]]:
        if isinstance(self.node, (*_FUNCTIONS, ast.Lambda)):
            arguments = self.node.args
            parameters = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            yield from ((parameter.arg, parameter) for parameter in parameters)
            yield from ((rest.arg, None) for rest in (arguments.vararg, arguments.kwarg) if rest is not None)
        assigned: set[int] = set()
        for node in _nodes(self.node):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    full = alias.name if alias.asname else alias.name.partition(".")[0]
                    yield alias.asname or full, full
            elif isinstance(node, ast.ImportFrom):
                source = self.module.absolute(node.module, node.level)
                for alias in node.names:
                    yield alias.asname or alias.name, f"{source}.{alias.name}" if source else None
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        assigned.add(id(target))
                        if node.value is not None:
                            yield target.id, node.value
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
                # Loops, unpacking, `with` and `+=`: not one expression's value.
                if id(node) not in assigned:
                    yield node.id, None
            elif isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
                yield node.name, node
            elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
                yield node.name, None
            elif isinstance(node, ast.MatchMapping) and node.rest:
                yield node.rest, None
            elif isinstance(node, ast.Global | ast.Nonlocal):
                elsewhere.update(node.names)


class ScopedVisitor(ast.NodeVisitor):
    """Visits a module's tree and knows at each node the scope that it stands in."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.scope = module.scope

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Decorators, defaults and annotations belong to the scope around the function."""
        for outside in (*node.decorator_list, node.args, node.returns):
            if outside is not None:
                self.visit(outside)
        self.visit_body(node, node.body)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        """As any function."""
        self.visit_FunctionDef(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Likewise."""
        self.visit(node.args)
        self.visit_body(node, [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Decorators and bases belong to the scope around the class."""
        for outside in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(outside)
        self.visit_body(node, node.body)

    def generic_visit(self, node: ast.AST) -> None:
        """Comprehensions are scopes too."""
        if isinstance(node, _COMPREHENSIONS):
            outside, self.scope = self.scope, self.module.within(node, self.scope)
            super().generic_visit(node)
            self.scope = outside
        else:
            super().generic_visit(node)

    def visit_body(self, node: ast.AST, body: Sequence[ast.AST]) -> None:
        """Visit what stands in the scope that a node opens."""
        outside, self.scope = self.scope, self.module.within(node, self.scope)
        for child in body:
            self.visit(child)
        self.scope = outside


def _nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope that may bind names, without what is inside of the scopes within it."""
    if isinstance(scope, ast.Lambda):
        return
    if isinstance(scope, _COMPREHENSIONS):
        pending: list[ast.AST] = [generator.target for generator in scope.generators]
    else:
        pending = list(getattr(scope, "body", ()))
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.Tuple | ast.List | ast.Starred):
            pending.extend(ast.iter_child_nodes(node))
        elif not isinstance(node, (ast.expr, *_FUNCTIONS, ast.ClassDef)):
            # Of the expressions in a statement, targets alone bind names; ruling out the rest is most of the speed.
            pending.extend(
                child
                for child in ast.iter_child_nodes(node)
                if not isinstance(child, ast.expr)
                or isinstance(getattr(child, "ctx", None), ast.Store | ast.Del)
            )
