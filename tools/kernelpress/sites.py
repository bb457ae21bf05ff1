"""Where the sources name operators, found on the syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from kernelpress.expressions import constants, first_literal, is_text, naming_argument, varying, words
from kernelpress.files import SourceFile
from kernelpress.names import ScopedVisitor
from kernelpress.text import Text

# Functions whose first argument names an operator: those that bring it into being, and those that take one
# that exists (and then also accept the operator itself).
_CREATE = frozenset(f"torch.library.{name}" for name in ("custom_op", "triton_op", "define"))
_ATTACH = frozenset(
    f"torch.library.{name}"
    for name in (
        "impl",
        "impl_abstract",
        "register_fake",
        "register_kernel",
        "register_autograd",
        "register_autocast",
        "register_vmap",
        "register_torch_dispatch",
        "opcheck",
        "get_kernel",
    )
)
_LIBRARIES = frozenset(("torch.library.Library", "torch.library._scoped_library"))
_LIBRARY_METHODS = ("define", "impl", "fallback", "_register_fake", "_register_torch_dispatch_rule")
_GETATTR = frozenset(f"builtins.{name}" for name in ("getattr", "hasattr", "setattr", "delattr"))
_OPS = "torch.ops"
_MENTIONS = re.compile(rb"\b(ops|library|_C)\b")

_RUN_TIME_OPERATOR = (
    "the namespace of this operator is only known when the code runs",
    'write it out as "namespace::operator", or use add_op_namespace_prefix from ._ops',
)
_RUN_TIME_NAMESPACE = ("this namespace is only known when the code runs", "write it out as a string")
_IN_PIECES = ("this name is put together of pieces or written with escapes", "write it in one piece")
_HIDDEN = (
    "this hides which operators are registered",
    "import the names that are used from torch.library",
)


@dataclass(frozen=True)
class Site:
    """A namespace as it stands in the source, at a range of bytes."""

    start: int
    end: int
    namespace: str
    op: str | None = None
    creates: bool = False


@dataclass(frozen=True)
class Problem:
    """A place that cannot be dealt with: its line, what is wrong with it and how to mend it."""

    line: int
    message: str
    fix: str


@dataclass(frozen=True)
class Sites:
    """What one file holds of operators. ``escapes`` are lines where ``torch.ops`` itself is handed on."""

    sites: tuple[Site, ...] = ()
    escapes: tuple[int, ...] = ()
    problems: tuple[Problem, ...] = ()


def library_names(files: Iterable[SourceFile]) -> frozenset[str]:
    """Names that any file binds to a ``Library``; methods of those take operator names.

    Files of a package share their libraries by importing them, and a name is all that an import shows.
    """
    bound = re.compile(rb"^\s*([A-Za-z_]\w*)\s*(?::[^=\n]*)?=\s*[\w.]*\bLibrary\(", re.MULTILINE)
    return frozenset(
        name.decode("ascii")
        for file in files
        if file.path.endswith(".py")
        for name in bound.findall(file.data)
    )


def find_sites(tree: ast.Module, text: Text, libraries: frozenset[str]) -> Sites:
    """Find where a file names operators or their namespaces.

    Args:
        tree: The file's syntax tree.
        text: Its content.
        libraries: Names that are bound to a ``Library`` anywhere in the package.
    """
    if not _MENTIONS.search(text.data) and not any(name.encode() in text.data for name in libraries):
        return Sites()
    finder = _Finder(tree, text, libraries)
    finder.visit(tree)
    return Sites(
        tuple(sorted(set(finder.sites), key=lambda site: site.start)),
        tuple(finder.escapes),
        tuple(finder.problems),
    )


class _Finder(ScopedVisitor):
    def __init__(self, tree: ast.Module, text: Text, libraries: frozenset[str]) -> None:
        super().__init__()
        self.text = text
        self.libraries = libraries
        self.sites: list[Site] = []
        self.escapes: list[int] = []
        self.problems: list[Problem] = []
        self.accounted: set[int] = set()
        self.tree = tree
        self.constants = constants(tree)
        self.words = words(tree, libraries)

    @cached_property
    def varying(self) -> frozenset[str]:
        """Names of the file that stand for something else each time."""
        return frozenset(name for node in ast.walk(self.tree) for name in varying(node))

    def visit(self, node: ast.AST) -> None:
        """Leave out statements without any word that could matter: most of a file, and most of the time."""
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            start, end = self.text.span(node)
            if not self.words.search(self.text.data, start, end):
                return
        super().visit(node)

    def refuse(self, node: ast.expr | ast.stmt, reason: tuple[str, str]) -> None:
        self.problems.append(Problem(node.lineno, *reason))

    def visit_Call(self, node: ast.Call) -> None:
        called = self.names(node.func)
        if called & _CREATE or called & _ATTACH:
            self.operator_argument(node, creates=bool(called & _CREATE))
        elif called & _LIBRARIES:
            self.library_argument(node)
        elif any(name.startswith("torch._C._dispatch_") for name in called):
            self.operator_argument(node, creates=False)
        elif (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in _LIBRARY_METHODS
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in self.libraries
        ):
            # A method of a `Library` takes names without a namespace, but also with its own.
            argument = naming_argument(node)
            if argument is not None:
                self.literal_operator(self.resolved(argument), creates=False)
        elif called & _GETATTR and len(node.args) >= 2 and _OPS in self.names(node.args[0]):
            self.accounted.add(id(node.args[0]))
            self.whole(node.args[1], creates=False)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if _OPS in self.names(node.value):
            self.accounted.add(id(node.value))
            end = self.text.span(node)[1]
            start = end - len(node.attr.encode("utf-8"))
            self.sites.append(Site(start, end, node.attr))
        elif id(node) not in self.accounted and node.attr == "ops" and _OPS in self.names(node):
            self.escapes.append(node.lineno)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if id(node) not in self.accounted and isinstance(node.ctx, ast.Load) and _OPS in self.names(node):
            self.escapes.append(node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "torch.ops" and not node.level:
            self.escapes.append(node.lineno)
        if node.module == "torch.library" and not node.level and node.names[0].name == "*":
            self.refuse(node, _HIDDEN)

    def operator_argument(self, call: ast.Call, *, creates: bool) -> None:
        argument = naming_argument(call)
        if argument is not None:
            self.operator(argument, creates=creates)

    def resolved(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Name) and node.id not in self.varying:
            return self.constants.get(node.id, node)
        return node

    def literal_operator(self, node: ast.expr, *, creates: bool) -> bool:
        """Note an expression whose value begins with ``namespace::``; false where it is something else."""
        leading = first_literal(node)
        if leading is None:
            return False
        literal, text = leading
        namespace, colons, rest = text.partition("::")
        if not (colons and namespace.isidentifier()):
            return False
        op = re.match(r"\w+", rest)
        self.site(literal, namespace, op[0] if op else None, creates=creates)
        return True

    def site(self, literal: ast.expr, namespace: str, op: str | None, *, creates: bool) -> None:
        start = self.text.literal(literal, namespace)
        if start is None:
            self.refuse(literal, _IN_PIECES)
        else:
            self.sites.append(Site(start, start + len(namespace.encode("utf-8")), namespace, op, creates))

    def operator(self, node: ast.expr, *, creates: bool) -> None:
        """An expression whose value is ``"namespace::operator"``, or an operator, or a ``Library``."""
        node = self.resolved(node)
        if self.literal_operator(node, creates=creates):
            return
        if isinstance(node, ast.Call) and self.from_helper(node):
            return
        if isinstance(node, ast.Name) and node.id in self.libraries:
            return
        # An operator itself may be handed on, but not something that may as well be its name.
        if not creates and not is_text(node) and not (isinstance(node, ast.Name) and node.id in self.varying):
            return
        self.refuse(node, _RUN_TIME_OPERATOR)

    def library_argument(self, call: ast.Call) -> None:
        kinds = [*call.args[1:2], *(each.value for each in call.keywords if each.arg == "kind")]
        implements = bool(kinds) and isinstance(kinds[0], ast.Constant) and kinds[0].value == "IMPL"
        argument = naming_argument(call)
        if argument is not None:
            self.whole(argument, creates=not implements)

    def whole(self, node: ast.expr, *, creates: bool) -> None:
        """An expression whose value is a namespace."""
        node = self.resolved(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            self.site(node, node.value, None, creates=creates)
        elif not any(isinstance(each, ast.Call) and self.from_helper(each) for each in ast.walk(node)):
            self.refuse(node, _RUN_TIME_NAMESPACE)

    def from_helper(self, call: ast.Call) -> bool:
        """Whether a name is made by the helper in the generated ``_ops``."""
        return any(name.endswith("_ops.add_op_namespace_prefix") for name in self.names(call.func))
