"""Edits that make imports of the kernel's own modules relative, and the other modules that each file imports."""

from __future__ import annotations

import ast
import io
import tokenize
from dataclasses import dataclass

from kernelpress.rewrite.resolve import Resolver
from kernelpress.rewrite.variables import WordVisitor, words_pattern
from kernelpress.source.module_map import VENDOR, ModuleMap
from kernelpress.syntax.dynamic_imports import IMPORTERS, Named, may_name, named, readings
from kernelpress.syntax.execution import When, execution_times
from kernelpress.syntax.expressions import first_literal
from kernelpress.syntax.imports import Import
from kernelpress.syntax.scopes import Module
from kernelpress.syntax.text import Edit

# The name of a kernel's top module is the first part of any of its modules' names.
_TOP = '__name__.partition(".")[0]'


@dataclass(frozen=True)
class Imports:
    """The imports of a file.

    ``edits`` make those of the kernel's own modules relative, ``missing`` are modules of the project that do
    not ship, ``outside`` those of other packages, and ``unknown`` lines with an import of the project whose
    name is only known when the code runs. At the lines in ``unread`` a module is imported by a name of which
    nothing is known; it may be of any package.
    """

    edits: tuple[Edit, ...] = ()
    missing: tuple[Import, ...] = ()
    outside: tuple[Import, ...] = ()
    unknown: tuple[int, ...] = ()
    unread: tuple[int, ...] = ()


def find_imports(module: Module, resolver: Resolver, module_map: ModuleMap) -> Imports:
    """Analyze every import of a module, given what ships with it and where."""
    visitor = _ImportVisitor(module, resolver, module_map)
    visitor.visit(module.file.tree)
    return Imports(
        tuple(visitor.edits),
        tuple(visitor.missing),
        tuple(visitor.outside),
        tuple(visitor.unknown),
        tuple(visitor.unread),
    )


class _ImportVisitor(WordVisitor):
    def __init__(self, module: Module, resolver: Resolver, module_map: ModuleMap) -> None:
        self.calls = may_name(module.file.data)
        super().__init__(module, None if self.calls else words_pattern({"import"}))
        self.resolver = resolver
        self.module_map = module_map
        self.text = module.file.text
        self.path = module.file.path
        self.depth = self.path.count("/")
        self.in_text = 0
        # Expressions that stand for a function that imports, and are called or assigned.
        self.followed: set[int] = set()
        self.when: dict[int, When] = {
            id(child): when
            for child, when in execution_times(module.file.tree, calls=self.calls)
            if isinstance(child, ast.Import | ast.ImportFrom | ast.Call | ast.Subscript | ast.Compare)
        }
        self.edits: list[Edit] = []
        self.missing: list[Import] = []
        self.outside: list[Import] = []
        self.unknown: list[int] = []
        self.unread: list[int] = []

    def visit(self, node: ast.AST) -> None:
        """Without a call that imports, statements are all there is to see."""
        if self.calls or not isinstance(node, ast.expr):
            super().visit(node)

    def note(self, where: list[Import], module: str, node: ast.expr | ast.stmt) -> None:
        where.append(Import(module, node.lineno, self.when[id(node)]))

    def relative(self, parts: tuple[str, ...]) -> str:
        """The name by which this file imports a module: always from the top, which holds for any two places."""
        return "." * (self.depth + 1) + ".".join(parts)

    # import a.b.c as d ------------------------------------------------------------------------------------

    def visit_Import(self, node: ast.Import) -> None:
        changed = False
        parts = []
        for alias in node.names:
            if alias.name.partition(".")[0] not in self.module_map.tops:
                self.note(self.outside, alias.name, node)
            elif self.module_map.place(alias.name) is None:
                self.note(self.missing, alias.name, node)
            else:
                changed = True
                parts.append(self.own(alias))
                continue
            parts.append(f"import {ast.unparse(alias)}")
        if changed:
            self.replace(node, parts)

    def own(self, alias: ast.alias) -> str:
        place = self.module_map.place(alias.name)
        assert place is not None
        if alias.asname:
            if not place:
                return f"{alias.asname} = __import__({_TOP})"
            # `from . import name` gives an attribute of the package where there is one, without importing the module
            # of that name; `import package.name as` always imports it first.
            first = f"from {self.relative(place)} import __name__ as {alias.asname}"
            if self.module_map.module_at(self.path) == alias.name.rpartition(".")[0]:
                # What a package's own `__init__` binds is the very attribute that is read then. (torch.compile cannot
                # trace `__import__`, so it is not for every import.)
                first = f'__import__({_TOP} + ".{".".join(place)}")'
            return f"{first}; from {self.relative(place[:-1])} import {place[-1]} as {alias.asname}"
        top = alias.name.partition(".")[0]
        if top == self.module_map.package:
            # No relative import binds the package itself; `__import__` returns it once the rest is imported.
            rest = f' + ".{".".join(place)}"' if place else ""
            return f"{top} = __import__({_TOP}{rest})"
        modules = [".".join(place)] * bool(place)
        if self.module_map.owns(alias.name):
            modules.append(f"{VENDOR}.{self.module_map.package.rpartition('.')[0]}")
        modules.append(f"{VENDOR}.{top}")
        names = ", ".join(f'".{name}"' for name in modules)
        return f'{top} = [__import__({_TOP} + n, None, None, ["__name__"]) for n in ({names},)][-1]'

    # from a.b import c ------------------------------------------------------------------------------------

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = self.module.absolute(node.module, node.level)
        if source is None:
            self.note(self.missing, "." * node.level + (node.module or ""), node)
            return
        if source.partition(".")[0] not in self.module_map.tops:
            self.note(self.outside, source, node)
            return
        place = self.module_map.place(source)
        empty = source in self.module_map.parents
        whole, others = [], []
        for alias in node.names:
            full = f"{source}.{alias.name}"
            if full == self.module_map.package:
                others.append(f"{alias.asname or alias.name} = __import__({_TOP})")
            elif place is None or (empty and self.module_map.place(full) is None):
                self.note(self.missing, source if place is not None or not empty else full, node)
                return
            else:
                whole.append(alias)
        if others:
            if whole:
                names = ", ".join(map(ast.unparse, whole))
                others.append(f"from {self.relative(place or ())} import {names}")
            self.replace(node, others)
        elif place is not None and not self.stays(node, place):
            start, end = self.source_span(node)
            pad = b"".join(b" \\" + newline for newline in self.text.newlines(start, end))
            self.edits.append(Edit(start, end, self.relative(place).encode("utf-8") + pad))

    def stays(self, node: ast.ImportFrom, place: tuple[str, ...]) -> bool:
        """True if a relative import names the same module in the kernel as it does in place."""
        if not node.level:
            return False
        folder = self.path.split("/")[:-1]
        kept = len(folder) - (node.level - 1)
        return kept >= 0 and (*folder[:kept], *(node.module or "").split(".")) == (
            *place,
            *([""] * (not node.module)),
        )

    def source_span(self, node: ast.ImportFrom) -> tuple[int, int]:
        """The range between ``from`` and ``import``, without the blanks around it."""
        start, end = self.text.span(node)
        segment = self.text.data[start:end].decode("utf-8")
        lines = [0]
        for line in segment.splitlines(keepends=True):
            lines.append(lines[-1] + len(line))
        tokens = [
            token
            for token in tokenize.generate_tokens(io.StringIO(segment, newline="").readline)
            if token.type in (tokenize.NAME, tokenize.OP)
        ]
        stop = next(index for index, token in enumerate(tokens) if token.string == "import")
        first, last = tokens[1].start, tokens[stop - 1].end
        begin = lines[first[0] - 1] + first[1]
        finish = lines[last[0] - 1] + last[1]
        return start + len(segment[:begin].encode("utf-8")), start + len(segment[:finish].encode("utf-8"))

    def replace(self, node: ast.stmt, parts: list[str]) -> None:
        """Put statements in the place of one, on as many lines as it had."""
        start, end = self.text.span(node)
        newlines = self.text.newlines(start, end)
        text = "; ".join(parts).encode("utf-8")
        if newlines:
            # An empty pair of parentheses does nothing and may hold line ends.
            text += b"; (" + b"".join(newlines) + b")"
        self.edits.append(Edit(start, end, text))

    # importlib.import_module("a.b.c"), sys.modules["a.b.c"] --------------------------------------------------

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self.in_text += 1
        self.generic_visit(node)
        self.in_text -= 1

    def visit_Call(self, node: ast.Call) -> None:
        self.followed.add(id(node.func))
        self.by_name(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, ast.Name) for target in node.targets):
            self.followed.add(id(node.value))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.passed_on(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.passed_on(node)
        self.generic_visit(node)

    def passed_on(self, node: ast.Name | ast.Attribute) -> None:
        """Note a function that imports by name where it is not called: what it imports cannot be seen."""
        if (
            id(node) not in self.followed
            and isinstance(node.ctx, ast.Load)
            and not IMPORTERS.isdisjoint(self.resolver.names(node, self.scope))
            and node.lineno not in self.unread
        ):
            self.unread.append(node.lineno)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.by_name(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        self.by_name(node)

    def by_name(self, node: ast.expr) -> None:
        self.generic_visit(node)
        named_module = named(node, lambda name: self.resolver.names(name, self.scope))
        if named_module is None:
            return
        rebound = isinstance(named_module.name, ast.Name) and named_module.name.id in self.module.rebound
        for value in readings(named_module.name, self.scope):
            self.read_name(node, value, named_module, alone=named_module.alone and not rebound)

    def read_name(self, node: ast.expr, name: ast.expr, named_module: Named, *, alone: bool) -> None:
        """Note one expression that a module's name may be read from; ``alone`` as in ``Named``."""
        literal, text = first_literal(name) or (None, "")
        own = text.partition(".")[0] in self.module_map.tops
        if isinstance(name, ast.Constant) and literal is name:
            if own:
                # A variable is given the new name wherever it gets its value.
                self.own_by_name(node, text, name if alone else None)
            elif named_module.does == "import" and text:
                # Without a name it is the package itself, by a level.
                self.note(self.outside, text, node)
        elif literal is not None and not text.startswith(("{", "%")):
            if own and "." in text:
                self.unknown.append(node.lineno)
        elif any(
            isinstance(part, ast.Constant) and str(part.value).partition(".")[0] in self.module_map.tops
            for part in ast.walk(name)
        ):
            self.unknown.append(node.lineno)
        elif named_module.does == "import" and not isinstance(name, ast.Constant):
            names = {part.id for part in ast.walk(name) if isinstance(part, ast.Name)}
            if names.isdisjoint(("__name__", "__package__")) and node.lineno not in self.unread:
                self.unread.append(node.lineno)

    def own_by_name(self, node: ast.expr, module: str, literal: ast.Constant | None) -> None:
        """A module of the project's, named by a string that may be replaced where it is given."""
        place = self.module_map.place(module)
        if place is None:
            self.note(self.missing, module, node)
        elif literal is None or self.in_text:
            # Within another string, its quotes may not be used again before Python 3.12.
            self.unknown.append(node.lineno)
        else:
            start, end = self.text.span(literal)
            new = f'{_TOP} + ".{".".join(place)}"' if place else _TOP
            pad = b"".join(b" \\" + newline for newline in self.text.newlines(start, end))
            edit = Edit(start, end, new.encode("utf-8") + pad)
            if edit not in self.edits:
                self.edits.append(edit)
