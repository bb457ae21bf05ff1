"""Resolution of names across the scopes and modules of a package: what they stand for, and where that is written."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from kernelpress.source.module_map import ModuleMap
from kernelpress.syntax.expressions import default_of, text_pieces
from kernelpress.syntax.scopes import Module, Scope
from kernelpress.syntax.source_file import SourceFile

# Variables that one expression's value may go through; one that goes through more is not known.
MOST_VARIABLES = 200
CONTAINERS = (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Starred, ast.BinOp, ast.BoolOp, ast.IfExp)
_CONSTRUCTORS = frozenset(("dict", "frozenset", "list", "set", "sorted", "tuple"))
_Partial = dict[tuple[int, str], frozenset[str]]


class Resolver:
    """The modules of a package, and what the names in them stand for.

    A full name is dotted, such as ``torch.library.custom_op``. With ``()`` it is what a call returns, so that
    ``torch.library.Library()`` is an instance, and a decorated function is what its decorator returns. A function or
    class of the package has a colon before its own name.
    """

    def __init__(self, files: Iterable[SourceFile], module_map: ModuleMap) -> None:
        self.tops = module_map.tops
        self.modules = {
            name: Module(file, name)
            for file in files
            if file.is_python
            for name in (module_map.module_at(file.path),)
        }
        self._resolved: dict[tuple[int, str], frozenset[str]] = {}

    def is_own(self, full: str) -> bool:
        """True for the full name of something in the package, or in what ships with it."""
        return full.partition(".")[0] in self.tops

    def names(self, node: ast.AST, scope: Scope) -> frozenset[str]:
        """Full names of all that an expression may stand for, as far as they are known."""
        return self._names(node, scope, None)

    def _names(self, node: ast.AST, scope: Scope, partial: _Partial | None) -> frozenset[str]:
        if isinstance(node, ast.Name):
            return self._variable(node.id, scope, partial)
        if isinstance(node, ast.Attribute):
            bases = self._names(node.value, scope, partial)
            return self._members((f"{base}.{node.attr}" for base in bases), partial) if bases else bases
        if isinstance(node, ast.Call):
            called = self._names(node.func, scope, partial)
            if "builtins.getattr" in called and len(node.args) > 1:
                return self._getattr(node, scope, partial)
            return frozenset(f"{name}()" for name in called)
        return frozenset()

    def _getattr(self, call: ast.Call, scope: Scope, partial: _Partial | None) -> frozenset[str]:
        attribute = call.args[1].value if isinstance(call.args[1], ast.Constant) else None
        if not isinstance(attribute, str):
            return frozenset()
        bases = self._names(call.args[0], scope, partial)
        return self._members((f"{base}.{attribute}" for base in bases), partial)

    def _variable(self, name: str, scope: Scope, partial: _Partial | None) -> frozenset[str]:
        bound = scope.lookup(name)
        if bound is None:
            stars = self._members((f"{star}.{name}" for star in scope.module.stars), partial)
            # What nothing binds but PyTorch is called by came with an import of everything.
            return stars | {"torch" if name == "torch" else f"builtins.{name}"}
        holder, bindings = bound
        key = id(holder), name
        if key in self._resolved:
            return self._resolved[key]
        # Once for each variable: what is assigned over and over from one another would take forever.
        outermost, partial = partial is None, {} if partial is None else partial
        if key not in partial:
            partial[key] = frozenset()
            if len(partial) > MOST_VARIABLES:
                return partial[key]
            for binding in bindings:
                partial[key] |= self._binding(binding, name, holder, partial)
        if outermost:
            self._resolved[key] = partial[key]
        return partial[key]

    def _binding(
        self, binding: str | ast.AST | None, name: str, scope: Scope, partial: _Partial
    ) -> frozenset[str]:
        if binding is None:
            return frozenset()
        if isinstance(binding, str):
            return self._members((binding,), partial)
        decorators = getattr(binding, "decorator_list", ())
        if decorators:
            return frozenset(
                f"{full}()" for decorator in decorators for full in self._names(decorator, scope, partial)
            )
        if isinstance(binding, ast.stmt):
            return frozenset((f"{scope.module.name}:{name}",))
        return self._names(binding, scope, partial)

    def _members(self, fulls: Iterable[str], partial: _Partial | None) -> frozenset[str]:
        """All that full names stand for, those of the package looked up in its modules."""
        partial = {} if partial is None else partial
        members: set[str] = set()
        for full in fulls:
            located = self.locate(full)
            if located is None:
                members.add(full)
                continue
            scope, name, rest = located
            if (id(scope), f"*{name}") in partial:
                continue
            partial[id(scope), f"*{name}"] = frozenset()
            bases = self._variable(name, scope, partial)
            del partial[id(scope), f"*{name}"]
            if name not in scope.bindings:
                bases -= {f"builtins.{name}"}
            if not (rest and bases):
                members |= bases or {full}
                continue
            for base in bases:
                following = f"{base}.{rest}"
                # A base that no module defines, or only in a circle of imports, leads back here.
                unresolved = self.locate(base) is not None
                members |= {following} if unresolved else self._members((following,), partial)
        return frozenset(members)

    def locate(self, full: str) -> tuple[Scope, str, str] | None:
        """The module's scope, the name in it and the attributes of that, which a full name is made of.

        Returns:
            ``None`` for what is not in the package, or is one of its modules.
        """
        if not self.is_own(full) or ":" in full:
            return None
        parts = full.split(".")
        for count in range(len(parts) - 1, 0, -1):
            module = self.modules.get(".".join(parts[:count]))
            if module is not None and full not in self.modules:
                return module.scope, parts[count], ".".join(parts[count + 1 :])
        return None

    def constant(self, node: ast.expr, scope: Scope) -> tuple[ast.expr, Scope]:
        """The expression that gives a name its value and the scope of it, if it is bound once on the way there."""
        for _ in range(MOST_VARIABLES):
            following = self._one_step(node, scope)
            if following is None:
                break
            node, scope = following
        return node, scope

    def text_pieces(self, node: ast.expr, scope: Scope) -> list[tuple[ast.expr, Scope]]:
        """The expressions that give a text its value, in order, each with its scope, up to one that is no string."""
        pieces: list[tuple[ast.expr, Scope]] = []
        pending = [(node, scope)]
        for _ in range(MOST_VARIABLES):
            if not pending:
                break
            node, scope = self.constant(*pending.pop())
            parts = text_pieces(node)
            if parts != [node]:
                pending += [(part, scope) for part in reversed(parts)]
                continue
            pieces.append((node, scope))
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                # What follows it is of use as it stands, to tell a namespace from a whole name.
                pieces += pending[-1:]
                break
        return pieces

    def texts(
        self, node: ast.expr, scope: Scope, into: tuple[type[ast.expr], ...] = ()
    ) -> Iterator[tuple[ast.Constant, Scope]]:
        """The strings that an expression's value may be, or be made of, with those that its variables are assigned.

        Args:
            node: The expression.
            scope: Its scope.
            into: Expressions whose parts are followed: none, those in ``CONTAINERS`` (of a dictionary the keys), or
                all, since any may put a text together.
        """
        pending = [(node, scope)]
        visited: set[int] = set()
        while pending:
            node, scope = pending.pop()
            if id(node) in visited or len(visited) > MOST_VARIABLES:
                continue
            visited.add(id(node))
            values = self._values(node, scope)
            if isinstance(node, ast.Constant):
                if isinstance(node.value, str):
                    yield node, scope
            elif values:
                pending += values
            elif into is CONTAINERS and isinstance(node, ast.Subscript):
                pending.append((node.value, scope))
            elif isinstance(node, into):
                keys = node.keys if isinstance(node, ast.Dict) and into is CONTAINERS else None
                children = ast.iter_child_nodes(node) if keys is None else keys
                pending += [(child, scope) for child in children if isinstance(child, ast.expr)]
            elif into and isinstance(node, ast.Call) and getattr(node.func, "id", "") in _CONSTRUCTORS:
                pending += [(argument, scope) for argument in node.args]

    def _values(self, node: ast.expr, scope: Scope) -> list[tuple[ast.expr, Scope]]:
        """All expressions that a variable is assigned, in other modules, too, and a parameter's default."""
        values: list[tuple[ast.expr, Scope]] = []
        if isinstance(node, ast.Name):
            bound = scope.lookup(node.id)
            holder, bindings = bound or (scope, [f"{star}.{node.id}" for star in scope.module.stars])
        elif isinstance(node, ast.Attribute):
            holder, bindings = scope, [f"{base}.{node.attr}" for base in self.names(node.value, scope)]
        else:
            return values
        for binding in bindings:
            place = self.locate(binding) if isinstance(binding, str) else None
            if isinstance(binding, ast.expr):
                values.append((binding, holder))
            elif isinstance(binding, ast.arg) and holder.parent is not None:
                default = default_of(holder.node.args, binding.arg)  # type: ignore[attr-defined]
                values += [(default, holder.parent)] if default else []
            elif place is not None and not place[2] and place[1] in place[0].bindings:
                values.append((ast.Name(place[1], ast.Load()), place[0]))
        return values

    def _one_step(self, node: ast.expr, scope: Scope) -> tuple[ast.expr, Scope] | None:
        if isinstance(node, ast.Name):
            bound = scope.lookup(node.id)
            if bound is None:
                sources = [f"{star}.{node.id}" for star in scope.module.stars]
            else:
                holder, bindings = bound
                if len(bindings) != 1:
                    return None
                if isinstance(bindings[0], ast.expr):
                    return bindings[0], holder
                sources = [bindings[0]] if isinstance(bindings[0], str) else []
        elif isinstance(node, ast.Attribute):
            sources = [f"{base}.{node.attr}" for base in self.names(node.value, scope)]
        else:
            return None
        places = [place for source in sources if (place := self.locate(source)) is not None]
        # Of several imports of everything, the one from a module that has the name.
        places = [place for place in places if len(places) == 1 or place[1] in place[0].bindings]
        if len(places) != 1 or places[0][2]:
            return None
        return ast.copy_location(ast.Name(places[0][1], ast.Load()), node), places[0][0]
