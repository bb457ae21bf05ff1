"""Names of operators and modules that stand in a source as text, which the build leaves as it is."""

from __future__ import annotations

import ast
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator

from kernelpress.rewrite.references import OpReferences, Problem
from kernelpress.rewrite.resolve import CONTAINERS, Resolver
from kernelpress.rewrite.torch_library import LIBRARY_METHODS
from kernelpress.rewrite.variables import WordVisitor, variables_at, words_pattern
from kernelpress.syntax.expressions import first_literal
from kernelpress.syntax.scopes import Module, Scope

# Functions that take code, a pattern, or the dotted name of something, as text.
_READERS = frozenset(
    (
        *("attrgetter", "compile", "eval", "exec", "patch", "resolve_name", "run_module"),
        *("findall", "finditer", "fullmatch", "match", "search", "split", "sub", "subn"),
    )
)
_READS = re.compile(rb"\b(?:%s)\s*\(|\b__(?:name|module|package)__\b" % "|".join(sorted(_READERS)).encode())
_LOOKUPS = frozenset(("__contains__", "__getitem__", "get", "index", "pop", "setdefault"))
TESTS = frozenset(("startswith", "removeprefix"))
# A value that a variable or a caller gets as it is.
_PASSED = (ast.Constant, ast.Name, ast.Attribute)
_MODULE_NAMES = frozenset(("__name__", "__module__", "__package__"))
# Methods of a log, and functions, that show text to somebody.
_SHOWS = frozenset(
    ("print", "critical", "debug", "error", "exception", "info", "log", "warn", "warning", "warning_once")
)

_NAMED = (
    "this names an operator of the package in a way that is not known, and stays as it is; in the build the operator "
    "has another name",
    "give the operator itself, or name it as a function of torch.library or torch.ops takes it",
)
_REGISTERED = (
    _NAMED[0],
    "call it on a variable that is assigned a torch.library.Library once, or leave the namespace out",
)


def find_names_in_text(
    resolver: Resolver, operators: OpReferences, own: set[str], tops: Collection[str]
) -> dict[str, set[int]]:
    """Find operators of the package that are named in text, which become problems of ``operators``, and its modules.

    Strings that name an operator count wherever they or their variables stand, but for what is only shown or returned,
    and those that are a mere namespace where they are compared or looked up.

    Args:
        resolver: The package's modules.
        operators: The references that are known.
        own: The namespaces that the package defines operators in.
        tops: Names of the project's top modules.

    Returns:
        For each path, the lines that name a module of the project.
    """
    modules = list(resolver.modules.values())
    reads = any(_READS.search(module.file.data) for module in modules)
    names = own | set(tops if reads else ())
    if not names:
        return {}
    # Import statements name modules as such, and are passed over quickly.
    imports = rb"" if reads else rb"^[ \t]*(?:import|from)\b[^\r\n;]*|"
    pattern = re.compile(rb"(?m)%s(%s)" % (imports, words_pattern(names).pattern))
    offsets = {}
    for module in modules:
        path, starts = module.file.path, operators.starts(module.file.path)
        matches = pattern.finditer(module.file.data)
        if found := [match.start(1) for match in matches if match[1] and match.start(1) not in starts]:
            offsets[path] = found
    variables = variables_at(modules, offsets)
    words = words_pattern(names | variables)
    uses = words_pattern(variables) if variables else None
    lines: dict[str, set[int]] = {}
    for module in modules:
        if module.file.path in offsets or (uses and uses.search(module.file.data)):
            visitor = _TextVisitor(module, resolver, operators, own, tops, words)
            visitor.visit(module.file.tree)
            lines[module.file.path] = visitor.module_lines
    return lines


class _TextVisitor(WordVisitor):
    def __init__(
        self,
        module: Module,
        resolver: Resolver,
        operators: OpReferences,
        own: set[str],
        tops: Collection[str],
        words: re.Pattern[bytes],
    ) -> None:
        super().__init__(module, words)
        self.resolver = resolver
        self.operators = operators
        self.own = own
        self.starts = sorted(operators.starts(module.file.path))
        names = "|".join(sorted(map(re.escape, own))) or r"(?!)"
        # A name or a schema as a whole, or the beginning of a name; and as graphs of torch.fx have it.
        self.whole = re.compile(rf"({names})(?:::\S*|::\w+(?:\.\w+)?\(.*|\.\w+\.default)", re.DOTALL)
        self.in_code = re.compile(rf"(?:\bops\.(?=\w+\.)|\b(?=\w+::))(?:{names})\b")
        projects = "|".join(sorted(map(re.escape, tops)))
        self.in_modules = re.compile(rf"(?:^|\bimport\s+|\bfrom\s+)(?:{projects})(?:\.\w|:(?!:)|\s|$)")
        self.module_lines: set[int] = set()
        self.passed: set[int] = set()
        # Arguments of what may be a method of a `Library`.
        self.registering: set[int] = set()

    def visit(self, node: ast.AST) -> None:
        """Leave out what is only shown, or returned, or given to a variable, whose uses count."""
        if isinstance(node, ast.Raise) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            return
        if isinstance(node, ast.Return | ast.Assign | ast.AnnAssign):
            self.passed.add(id(node.value))
        if isinstance(node, ast.expr):
            if shows(node):
                return
            if not (id(node) in self.passed and isinstance(node, _PASSED)):
                self.name(node)
            self.attribute_of_ops(node)
        if isinstance(node, ast.Call):
            self.code(node)
        for value in compared(node):
            self.compare(node, value)
        super().visit(node)

    def note(self, node: ast.expr | ast.pattern, *, registers: bool = False) -> None:
        problem = (
            Problem(node.lineno, *_REGISTERED) if registers else Problem(node.lineno, *_NAMED, "warning")
        )
        self.operators.problem(self.module.file.path, problem)

    def name(self, node: ast.expr) -> None:
        """Note a text that is an operator's name as a whole, or begins with one."""
        leading = first_literal(node)
        if leading and self.whole.fullmatch(leading[1]):
            start, end = self.module.file.text.span(node)
            index = bisect_left(self.starts, start)
            if index == len(self.starts) or self.starts[index] >= end:
                self.note(node, registers=id(node) in self.registering)
        if isinstance(getattr(node, "ctx", None), ast.Load):
            for literal, scope in self.resolver.texts(node, self.scope):
                file, match = scope.module.file, self.whole.fullmatch(str(literal.value))
                if match and file.text.literal(literal, match[1]) not in self.operators.starts(file.path):
                    self.note(node, registers=id(node) in self.registering)

    def attribute_of_ops(self, node: ast.expr) -> None:
        """Note an operator of an ``ops`` that may be any."""
        if isinstance(node, ast.Attribute) and node.attr in self.own:
            holder = getattr(node.value, "attr", getattr(node.value, "id", ""))
            start = self.module.file.text.span(node)[1] - len(node.attr.encode("utf-8"))
            if holder == "ops" and start not in self.starts:
                self.note(node)

    def code(self, call: ast.Call) -> None:
        """Note names in text that a call runs or looks up, and names that it may hand to a ``Library``."""
        function = _last_name(call.func)
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        if function in LIBRARY_METHODS or function in self.operators.registrars:
            self.registering.update(map(id, arguments))
        texts = [
            literal
            for argument in (arguments if function in _READERS else ())
            for literal in self.resolver.texts(argument, self.scope, (ast.expr,))
        ]
        if any(
            self.in_code.search(str(literal.value)) or self.is_own(literal, scope) for literal, scope in texts
        ):
            self.note(call)
        if any(self.in_modules.search(str(literal.value)) for literal, _ in texts):
            self.module_lines.add(call.lineno)

    def is_own(self, literal: ast.Constant, scope: Scope) -> bool:
        """True for a text that is a namespace of the package and stays as it is."""
        text, file = str(literal.value), scope.module.file
        return text in self.own and file.text.literal(literal, text) not in self.operators.starts(file.path)

    def compare(self, node: ast.AST, value: ast.expr) -> None:
        """Note a namespace, or the name of a module, that something is compared with."""
        subjects = {_last_name(part) for part in ast.walk(node) if isinstance(part, ast.expr)}
        of_module = not _MODULE_NAMES.isdisjoint(subjects)
        for literal, scope in self.resolver.texts(value, self.scope, CONTAINERS):
            if of_module and self.in_modules.match(str(literal.value)):
                self.module_lines.add(value.lineno)
            elif self.is_own(literal, scope):
                self.note(value)


def shows(node: ast.expr) -> bool:
    """True for a call that shows text to somebody."""
    return isinstance(node, ast.Call) and _last_name(node.func) in _SHOWS


def compared(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions whose strings something is compared with or looked up in."""
    if isinstance(node, ast.Compare):
        yield from (node.left, *node.comparators)
    elif (
        isinstance(node, ast.MatchValue)
        or (isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Constant))
        or (isinstance(node, ast.Assign) and _last_name(node.targets[0]) in _MODULE_NAMES)
    ):
        yield node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        if node.func.attr in TESTS:
            yield node.args[0]
        elif node.func.attr in _LOOKUPS and not isinstance(node.args[0], ast.Constant):
            yield node.func.value


def _last_name(node: ast.expr) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))
