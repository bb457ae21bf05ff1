"""Where the sources name operators, found on the syntax tree."""

from __future__ import annotations

import ast
import re
from functools import cached_property

from kernelpress.expressions import ALWAYS, first_literal, is_text, mentions, rebound, words
from kernelpress.handed_on import absolute, stands_for
from kernelpress.names import Known, ScopedVisitor, choices
from kernelpress.occurrences import Kind, Problem, Site, Sites, Wanted
from kernelpress.registering import (
    LIBRARIES,
    LIBRARY_METHODS,
    OPS,
    attaches,
    creates,
    dispatches,
    implements,
    may_take_names,
    naming_argument,
    unpacks,
)
from kernelpress.shared import Shared
from kernelpress.text import Text

_GETATTR = frozenset(f"builtins.{name}" for name in ("getattr", "hasattr", "setattr", "delattr"))
_LOOK_UP = ("__getattr__", "__getattribute__")
_MENTIONS = mentions(ALWAYS)

_RUN_TIME_OPERATOR = (
    "the namespace of this operator is only known when the code runs",
    'write it out as "namespace::operator", give the operator itself, or use add_op_namespace_prefix from ._ops',
)
_RUN_TIME_NAMESPACE = ("this namespace is only known when the code runs", "write it out as a string")
_IN_PIECES = ("this name is put together of pieces or written with escapes", "write it in one piece")
_HIDDEN = (
    "this hides which operators are registered",
    "import the names that are used from torch.library",
)


def find_sites(tree: ast.Module, text: Text, shared: Shared, module: str, path: str) -> Sites:
    """Find where a file names operators or their namespaces.

    Args:
        tree: The file's syntax tree.
        text: Its content.
        shared: What the files of its package share.
        module: Its module's name in place.
        path: Its path in the kernel.
    """
    if not _MENTIONS.search(text.data) and not any(name.encode() in text.data for name in shared.words):
        return Sites()
    finder = Finder(tree, text, shared, module, path)
    finder.visit(tree)
    return Sites(
        tuple(sorted(set(finder.sites), key=lambda site: site.start)),
        tuple(finder.escapes),
        tuple(finder.problems),
        tuple(dict.fromkeys(finder.wanted)),
    )


class Finder(ScopedVisitor):
    """Collects what ``find_sites`` returns while it visits a tree."""

    def __init__(self, tree: ast.Module, text: Text, shared: Shared, module: str, path: str) -> None:
        super().__init__(walrus=b":=" in text.data)
        self.text = text
        self.shared = shared
        self.module = module
        self.path = path
        self.sites: list[Site] = []
        self.escapes: list[int] = []
        self.problems: list[Problem] = []
        self.wanted: list[Wanted] = []
        self.accounted: set[int] = set()
        self.tree = tree
        self.words = words(tree, shared.words, shared.tops, walrus=self.walrus)

    @cached_property
    def rebound(self) -> frozenset[str]:
        """Names that stand for one thing at first and for another later."""
        return rebound(self.tree) if re.search(rb"\b(?:global|nonlocal)\b", self.text.data) else frozenset()

    def visit(self, node: ast.AST) -> None:
        """Leave out statements without any word that could matter: most of a file, and most of the time."""
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            start, end = self.text.span(node)
            if not self.words.search(self.text.data, start, end):
                return
        super().visit(node)

    def refuse(self, node: ast.expr | ast.stmt, reason: tuple[str, str]) -> None:
        self.problems.append(Problem(node.lineno, *reason))

    def names(self, node: ast.AST, _known: Known | None = None) -> frozenset[str]:
        """With PyTorch's own names of what the package's modules hand on."""
        found = super().names(node, _known)
        if isinstance(node, ast.Name) and f"builtins.{node.id}" in found:
            everything = self.everything
            found |= {f"{star}.{node.id}" for star in everything}
        more: set[str] = set()
        for name in found:
            if self.shared.own(name):
                parts = absolute(name, self.module, self.path)
                more |= stands_for(parts, self.shared.given)
                if self.shared.torch and "torch" in parts[1:]:
                    more.add(".".join(parts[parts.index("torch") :]))
        return found | more if more else found

    @cached_property
    def everything(self) -> tuple[str, ...]:
        """Modules of the package all of whose names the file imports."""
        found = ScopedVisitor(walrus=False)
        found.scopes = [self.tree]
        stars = [star for star in found.bound("*") or () if isinstance(star, str) and self.shared.own(star)]
        return tuple(star.removesuffix(".*") for star in stars)

    def is_ops(self, node: ast.AST) -> bool:
        """Whether an expression stands for ``torch.ops``."""
        return any(
            name in OPS
            or (self.shared.own(name) and name.rpartition(".")[2] in self.shared.ops and "_ops." not in name)
            for name in self.names(node)
        )

    def visit_Call(self, node: ast.Call) -> None:
        called = self.names(node.func)
        if "functools.partial" in called and len(node.args) > 1:
            self.registration(node, self.names(node.args[0]), skip=1)
        elif self.registration(node, called):
            pass
        elif (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in LIBRARY_METHODS
            and self.is_library(node.func.value)
        ):
            # A method of a `Library` takes names without a namespace, but also with its own.
            argument = naming_argument(node, method=True)
            if argument is not None and not self.literal_operator(self.resolved(argument), creates=False):
                self.imported(argument, self.resolved(argument), "name", creates=False)
        elif called & _GETATTR and len(node.args) >= 2 and self.is_ops(node.args[0]):
            self.accounted.add(id(node.args[0]))
            self.whole(node.args[1], creates=False)
        elif (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in _LOOK_UP
            and node.args
            and self.is_ops(node.func.value)
        ):
            self.accounted |= {id(node.func), id(node.func.value)}
            self.whole(node.args[0], creates=False)
        elif id(node) not in self.accounted and self.is_ops(node):
            self.escapes.append(node.lineno)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign) -> None:
        """A name for ``torch.ops`` is followed, if it is a variable of a function or of a module."""
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if (
            node.value is not None
            and self.is_ops(node.value)
            and not isinstance(self.scopes[-1], ast.ClassDef)
            and all(self.followed(target) for target in targets)
        ):
            self.accounted.add(id(node.value))
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit_Assign(node)

    def followed(self, target: ast.expr) -> bool:
        """Whether every use of a variable is known to be one of ``torch.ops``."""
        if not isinstance(target, ast.Name) or target.id in self.rebound:
            return False
        # Other modules may import it, and know it by the form that its definition must have.
        return not isinstance(self.scopes[-1], ast.Module) or target.id in self.shared.ops

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self.is_ops(node.value) and id(node) not in self.accounted:
            self.accounted.add(id(node.value))
            end = self.text.span(node)[1]
            start = end - len(node.attr.encode("utf-8"))
            if node.attr.startswith("__"):
                self.escapes.append(node.lineno)
            elif self.text.data[start:end] != node.attr.encode("utf-8"):
                # Python takes letters for others that look alike.
                self.refuse(node, _IN_PIECES)
            else:
                self.sites.append(Site(start, end, node.attr))
        elif id(node) not in self.accounted and self.is_ops(node):
            self.escapes.append(node.lineno)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if id(node) not in self.accounted and isinstance(node.ctx, ast.Load) and self.is_ops(node):
            self.escapes.append(node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "torch.ops" and not node.level:
            self.escapes.append(node.lineno)
        if node.module == "torch.library" and not node.level and node.names[0].name == "*":
            self.refuse(node, _HIDDEN)

    def registration(self, call: ast.Call, called: frozenset[str], skip: int = 0) -> bool:
        """Look at a call of a function of these names; false where it takes neither operators nor namespaces.

        What takes the name comes after ``skip`` other arguments.
        """
        argument = naming_argument(call, skip=skip)
        if creates(called) or attaches(called):
            if argument is None and unpacks(call):
                self.refuse(call, _RUN_TIME_OPERATOR)
            if argument is not None:
                self.operator(argument, creates=creates(called))
                if self.is_library(argument) and len(call.args) > skip + 1:
                    self.literal_operator(self.resolved(call.args[skip + 1]), creates=False)
        elif called & LIBRARIES:
            if argument is None and unpacks(call):
                self.refuse(call, _RUN_TIME_NAMESPACE)
            if argument is not None:
                self.whole(argument, creates=not implements(call, skip))
        elif argument is not None and dispatches(called):
            self.operator(argument, creates=False, strict=False)
        elif argument is not None and may_take_names(called):
            self.literal_operator(self.resolved(argument), creates=False)
        else:
            return False
        return True

    def resolved(self, node: ast.expr) -> ast.expr:
        """What a name stands for, if it is bound once, by an assignment."""
        seen: set[str] = set()
        while isinstance(node, ast.Name) and node.id not in self.rebound and node.id not in seen:
            seen.add(node.id)
            bindings = self.bound(node.id)
            if bindings is None or len(bindings) != 1 or not isinstance(bindings[0], ast.expr):
                break
            node = bindings[0]
        return node

    def is_library(self, node: ast.expr, _seen: set[int] | None = None) -> bool:
        """Whether an expression may stand for a ``Library``, by its name or by what the name is bound to."""
        name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
        if name in self.shared.libraries or any(
            self.shared.own(each) and each.rpartition(".")[2] in self.shared.libraries
            for each in self.names(node)
        ):
            return True
        seen = set() if _seen is None else _seen
        parts = choices(node)
        if isinstance(node, ast.Name):
            bindings = self.bound(node.id) or []
            parts = [each for each in bindings if isinstance(each, ast.expr) and id(bindings) not in seen]
            seen.add(id(bindings))
        elif isinstance(node, ast.Call):
            return not self.names(node.func).isdisjoint(LIBRARIES)
        return any(each is not node and self.is_library(each, seen) for each in parts)

    def is_operator(self, node: ast.AST, depth: int = 20) -> bool:
        """Whether an expression stands for an operator itself, and cannot be its name.

        A function may be one by its decorator, and a name from another library is none that is rewritten.
        """
        if any(
            name.startswith("torch.ops.") or not (self.shared.own(name) or name.startswith("builtins."))
            for name in self.names(node)
        ):
            return True
        if isinstance(node, ast.Call):
            return creates(self.names(node.func)) or (
                isinstance(node.func, ast.Call) and self.is_operator(node.func)
            )
        if isinstance(node, ast.Attribute):
            return self.is_operator(node.value)
        if isinstance(node, ast.Name) and depth:
            bindings = self.bound(node.id) or []
            return bool(bindings) and all(
                isinstance(each, ast.stmt)
                or (isinstance(each, ast.expr) and self.is_operator(each, depth - 1))
                for each in bindings
            )
        return False

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

    def operator(self, node: ast.expr, *, creates: bool, strict: bool = True) -> None:
        """An expression whose value is ``"namespace::operator"``, or an operator, or a ``Library``."""
        asked, node = node, self.resolved(node)
        if self.literal_operator(node, creates=creates) or self.is_library(asked) or self.is_library(node):
            return
        if isinstance(node, ast.Call) and self.from_helper(node):
            return
        if strict and self.imported(asked, node, "operator", creates=creates):
            return
        if not creates and (self.is_operator(node) or (not strict and not is_text(node))):
            return
        self.refuse(asked, _RUN_TIME_OPERATOR)

    def imported(self, asked: ast.expr, node: ast.expr, kind: Kind, *, creates: bool) -> bool:
        """Note what another module of the package binds; false where it is something else."""
        names = [name for name in self.names(node) if self.shared.own(name)]
        self.wanted += (Wanted(name, asked.lineno, kind, creates) for name in sorted(names))
        return bool(names)

    def whole(self, node: ast.expr, *, creates: bool) -> None:
        """An expression whose value is a namespace."""
        asked, node = node, self.resolved(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            self.site(node, node.value, None, creates=creates)
        elif any(isinstance(each, ast.Call) and self.from_helper(each) for each in ast.walk(node)):
            return
        elif not self.imported(asked, node, "namespace", creates=creates):
            self.refuse(asked, _RUN_TIME_NAMESPACE)

    def from_helper(self, call: ast.Call) -> bool:
        """Whether a name is made by the helper in the generated ``_ops``."""
        return any(name.endswith("_ops.add_op_namespace_prefix") for name in self.names(call.func))
