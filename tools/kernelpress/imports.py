"""Imports of one file: which of them change so that the kernel finds its own modules, and what else it asks for."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from kernelpress.by_name import Named, may_name, named, readings
from kernelpress.expressions import rebound
from kernelpress.layout import VENDOR, Layout
from kernelpress.names import ScopedVisitor
from kernelpress.text import Edit, Text
from kernelpress.when import When, timed

# The name of a kernel's top module is the first part of any of its modules' names.
_TOP = '__name__.partition(".")[0]'


@dataclass(frozen=True)
class Import:
    """A module that a file imports: its full name in place, where, and when."""

    module: str
    line: int
    when: When


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


def find_imports(tree: ast.Module, text: Text, path: str, module: str, layout: Layout) -> Imports:
    """Look at every import of a file.

    Args:
        tree: The file's syntax tree.
        text: Its content.
        path: Its path in the kernel.
        module: Its module's name in place.
        layout: What ships, and where.
    """
    visitor = _Imports(text, path, module, layout)
    visitor.visit(tree)
    return Imports(
        tuple(visitor.edits),
        tuple(visitor.missing),
        tuple(visitor.outside),
        tuple(visitor.unknown),
        tuple(visitor.unread),
    )


def imported_modules(tree: ast.Module, path: str, module: str) -> Iterator[tuple[str, tuple[str, ...], When]]:
    """Each import of a file as a full module name, the names taken from it, and when it runs."""
    walker = _Imports(Text(b""), path, module, Layout(module))
    for node, when in timed(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, (), when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = walker.absolute(node)
            if source is not None:
                yield source, tuple(alias.name for alias in node.names), when
        elif isinstance(node, ast.Call) and node.args:
            first = node.args[0]
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value), (), when


class _Imports(ScopedVisitor):
    def __init__(self, text: Text, path: str, module: str, layout: Layout) -> None:
        super().__init__(walrus=b":=" in text.data)
        self.text = text
        self.path = path
        self.module = module
        self.layout = layout
        self.depth = path.count("/")
        self.calls = may_name(text.data)
        self.in_text = 0
        self.when: dict[int, When] = {}
        self.edits: list[Edit] = []
        self.missing: list[Import] = []
        self.outside: list[Import] = []
        self.unknown: list[int] = []
        self.unread: list[int] = []

    def visit_Module(self, node: ast.Module) -> None:
        self.tree = node
        self.when = {
            id(child): when
            for child, when in timed(node, calls=self.calls)
            if isinstance(child, ast.Import | ast.ImportFrom | ast.Call | ast.Subscript | ast.Compare)
        }
        super().visit_Module(node)

    def visit(self, node: ast.AST) -> None:
        """Without a call that imports, statements are all there is to see."""
        if self.calls or not isinstance(node, ast.expr):
            super().visit(node)

    def note(self, where: list[Import], module: str, node: ast.expr | ast.stmt) -> None:
        where.append(Import(module, node.lineno, self.when[id(node)]))

    def relative(self, parts: tuple[str, ...]) -> str:
        """How this file names a module of the kernel: always from the top, which holds for any two places."""
        return "." * (self.depth + 1) + ".".join(parts)

    def absolute(self, node: ast.ImportFrom) -> str | None:
        """The full name in place of what is imported from; ``None`` above the top of the project."""
        if not node.level:
            return node.module or ""
        parts = self.module.split(".")
        if not self.path.endswith("__init__.py"):
            parts = parts[:-1]
        kept = len(parts) - (node.level - 1)
        if kept < 1:
            return None
        return ".".join((*parts[:kept], *((node.module,) if node.module else ())))

    # import a.b.c as d ------------------------------------------------------------------------------------

    def visit_Import(self, node: ast.Import) -> None:
        changed = False
        parts = []
        for alias in node.names:
            if alias.name.partition(".")[0] not in self.layout.tops:
                self.note(self.outside, alias.name, node)
            elif self.layout.place(alias.name) is None:
                self.note(self.missing, alias.name, node)
            else:
                changed = True
                parts.append(self.own(alias))
                continue
            parts.append(f"import {ast.unparse(alias)}")
        if changed:
            self.replace(node, parts)

    def own(self, alias: ast.alias) -> str:
        place = self.layout.place(alias.name)
        assert place is not None
        if alias.asname:
            if not place:
                return f"{alias.asname} = __import__({_TOP})"
            # `from . import name` gives an attribute of the package where there is one, without importing the module
            # of that name; `import package.name as` always imports it first.
            first = f"from {self.relative(place)} import __name__ as {alias.asname}"
            return f"{first}; from {self.relative(place[:-1])} import {place[-1]} as {alias.asname}"
        top = alias.name.partition(".")[0]
        if top == self.layout.package:
            # No relative import binds the package itself; `__import__` returns it once the rest is imported.
            rest = f' + ".{".".join(place)}"' if place else ""
            return f"{top} = __import__({_TOP}{rest})"
        wanted = [".".join(place)] * bool(place)
        if self.layout.owns(alias.name):
            wanted.append(f"{VENDOR}.{self.layout.package.rpartition('.')[0]}")
        wanted.append(f"{VENDOR}.{top}")
        names = ", ".join(f'".{name}"' for name in wanted)
        return f'{top} = [__import__({_TOP} + n, None, None, ["__name__"]) for n in ({names},)][-1]'

    # from a.b import c ------------------------------------------------------------------------------------

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = self.absolute(node)
        if source is None:
            self.note(self.missing, "." * node.level + (node.module or ""), node)
            return
        if source.partition(".")[0] not in self.layout.tops:
            self.note(self.outside, source, node)
            return
        place = self.layout.place(source)
        empty = source in self.layout.parents
        whole, others = [], []
        for alias in node.names:
            full = f"{source}.{alias.name}"
            if full == self.layout.package:
                others.append(f"{alias.asname or alias.name} = __import__({_TOP})")
            elif place is None or (empty and self.layout.place(full) is None):
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
        """Whether a relative import names the same module in the kernel as it does in place."""
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
        self.by_name(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.by_name(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        self.by_name(node)

    def by_name(self, node: ast.expr) -> None:
        self.generic_visit(node)
        found = named(node, self.names)
        if found is None:
            return
        elsewhere = isinstance(found.name, ast.Name) and found.name.id in self.rebound
        for value in readings(found.name, self.bound):
            self.read_name(node, value, found, alone=found.alone and not elsewhere)

    @cached_property
    def rebound(self) -> frozenset[str]:
        """Variables that functions assign outside of themselves."""
        return rebound(self.tree)

    def read_name(self, node: ast.expr, name: ast.expr, found: Named, *, alone: bool) -> None:
        """One expression that a module's name may be read from; ``alone`` as in ``Named``."""
        if isinstance(name, ast.Constant) and name.value is None:
            return
        leading = name.left if isinstance(name, ast.BinOp) else name
        if isinstance(leading, ast.JoinedStr) and leading.values:
            leading = leading.values[0]
        if not (isinstance(leading, ast.Constant) and isinstance(leading.value, str)):
            own = ("__name__", "__package__")
            if (
                found.does == "import"
                and node.lineno not in self.unread
                and not any(isinstance(each, ast.Name) and each.id in own for each in ast.walk(name))
            ):
                self.unread.append(node.lineno)
            return
        module = leading.value
        if leading is not name:
            if module.partition(".")[0] in self.layout.tops and "." in module:
                self.unknown.append(node.lineno)
        elif module.partition(".")[0] in self.layout.tops:
            # A variable is given the new name wherever it gets its value.
            self.own_by_name(node, module, leading if alone else None)
        elif found.does == "import":
            self.note(self.outside, module, node)

    def own_by_name(self, node: ast.expr, module: str, literal: ast.Constant | None) -> None:
        """A module of the project's, named by a string that may be replaced where it is given."""
        place = self.layout.place(module)
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
