"""Where the sources name operators and the package itself, found on the syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
from libcst.helpers import get_full_name_for_node
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, QualifiedNameProvider

from kernelpress.errors import SourceError
from kernelpress.source import SourceFile, parse

_BOM = b"\xef\xbb\xbf"

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
_LIBRARY = "torch.library.Library"
_LIBRARY_METHODS = ("define", "impl", "fallback", "_register_fake", "_register_torch_dispatch_rule")
_NAME_KEYWORDS = ("qualname", "name", "op", "opname", "ns")
_GETATTR = frozenset(f"builtins.{name}" for name in ("getattr", "hasattr"))
_OPS = "torch.ops"
_TORCH_PARTS = ("library", "ops", "_C")


@dataclass(frozen=True)
class Site:
    """A namespace as it stands in the source, at a range of bytes."""

    start: int
    end: int
    namespace: str
    op: str | None = None
    creates: bool = False


@dataclass(frozen=True)
class Edit:
    """New text for a range of bytes; ``None`` for text stands for the op namespace."""

    start: int
    end: int
    text: bytes | None


@dataclass(frozen=True)
class Found:
    """What one file holds that may have to change."""

    file: SourceFile
    sites: tuple[Site, ...]
    imports: tuple[Edit, ...]
    escapes: tuple[int, ...]


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


def find(file: SourceFile, package: str, package_dir: Path, libraries: frozenset[str]) -> Found:
    """Find every place of a file that names an operator, or the package in an import.

    Args:
        file: The file, valid Python.
        package: The name under which the package imports itself in place.
        package_dir: Where the package stands, for messages.
        libraries: Names bound to a ``torch.library.Library`` anywhere in the package.

    Raises:
        SourceError: An operator's namespace is only known when the code runs; with file and line.
    """
    # Resolving names is by far the slowest step of a build, and most files have nothing to rewrite.
    if not file.path.endswith((".py", ".pyi")) or not _concerned(parse(file.data), package, libraries):
        return Found(file, (), (), ())
    bom = len(_BOM) if file.data.startswith(_BOM) else 0
    try:
        module = cst.parse_module(file.data[bom:].decode("utf-8"))
    except cst.ParserSyntaxError as error:
        raise SourceError(
            f"syntax error: {error.message}", path=package_dir / file.path, line=error.raw_line
        ) from None
    finder = _Finder(file, bom, package, package_dir, libraries)
    MetadataWrapper(module, unsafe_skip_copy=True).visit(finder)
    return Found(
        file,
        tuple(sorted(set(finder.sites), key=lambda site: site.start)),
        tuple(finder.imports),
        tuple(finder.escapes),
    )


def _concerned(tree: ast.Module, package: str, libraries: frozenset[str]) -> bool:
    """Whether a module can hold anything to rewrite: a quick look, which may say yes too often."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            if any(
                alias.name.startswith(("torch.", f"{package}.")) or alias.name == package
                for alias in node.names
            ):
                return True
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if not node.level and module.partition(".")[0] == package:
                return True
            if module.startswith(("torch.library", "torch.ops")) or (
                module == "torch" and any(alias.name in _TORCH_PARTS for alias in node.names)
            ):
                return True
        elif isinstance(node, ast.Attribute) and (
            node.attr in _TORCH_PARTS
            or (
                isinstance(node.value, ast.Name)
                and node.value.id in libraries
                and node.attr in _LIBRARY_METHODS
            )
        ):
            return True
    return False


def error_at(file: SourceFile, package_dir: Path, offset: int, message: str) -> SourceError:
    """An error about the line of a file in which a byte stands."""
    return SourceError(message, path=package_dir / file.path, line=file.data.count(b"\n", 0, offset) + 1)


class _Finder(cst.CSTVisitor):
    """Collects the places of one file where a namespace or the package's own name stands."""

    METADATA_DEPENDENCIES = (QualifiedNameProvider, ByteSpanPositionProvider)

    def __init__(
        self, file: SourceFile, bom: int, package: str, package_dir: Path, libraries: frozenset[str]
    ) -> None:
        super().__init__()
        self.file = file
        self.bom = bom
        self.package = package
        self.package_dir = package_dir
        self.libraries = libraries
        self.sites: list[Site] = []
        self.imports: list[Edit] = []
        self.escapes: list[int] = []
        self.constants: dict[str, cst.BaseExpression] = {}
        self.ops_aliases: set[str] = set()
        self.varying: set[str] = set()
        self.accounted: set[cst.CSTNode] = set()

    # Names and places ---------------------------------------------------------------------------------

    def names(self, node: cst.CSTNode) -> set[str]:
        return {each.name for each in self.get_metadata(QualifiedNameProvider, node, set())}

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        place = self.get_metadata(ByteSpanPositionProvider, node)
        start = place.start + self.bom
        return start, start + place.length

    def refuse(self, node: cst.CSTNode, message: str) -> SourceError:
        return error_at(self.file, self.package_dir, self.span(node)[0], message)

    # Operators ----------------------------------------------------------------------------------------

    def visit_Module(self, node: cst.Module) -> None:
        """Constants of the module: bound once, to something whose text is known."""
        bound: dict[str, list[cst.BaseExpression | None]] = {}
        for statement in node.body:
            if not isinstance(statement, cst.SimpleStatementLine):
                continue
            for small in statement.body:
                if isinstance(small, cst.Assign):
                    for target in small.targets:
                        if isinstance(target.target, cst.Name):
                            bound.setdefault(target.target.value, []).append(small.value)
                elif isinstance(small, cst.AnnAssign | cst.AugAssign) and isinstance(small.target, cst.Name):
                    value = small.value if isinstance(small, cst.AnnAssign) else None
                    bound.setdefault(small.target.value, []).append(value)
        self.constants = {
            name: values[0] for name, values in bound.items() if len(values) == 1 and values[0] is not None
        }

    def visit_Call(self, node: cst.Call) -> None:
        called = self.names(node.func)
        if called & _CREATE or called & _ATTACH:
            self.operator_argument(node, creates=bool(called & _CREATE))
        elif _LIBRARY in called:
            self.library_argument(node)
        elif any(name.startswith("torch._C._dispatch_") for name in called):
            self.operator_argument(node, creates=False)
        elif (
            isinstance(node.func, cst.Attribute)
            and node.func.attr.value in _LIBRARY_METHODS
            and isinstance(node.func.value, cst.Name)
            and node.func.value.value in self.libraries
        ):
            self.library_method(node)
        elif called & _GETATTR and len(node.args) >= 2 and _OPS in self.names(node.args[0].value):
            self.accounted.add(node.args[0].value)
            self.whole(node.args[1].value, creates=False)

    def visit_Attribute(self, node: cst.Attribute) -> None:
        if _OPS in self.names(node.value):
            self.accounted.add(node.value)
            self.sites.append(Site(*self.span(node.attr), node.attr.value))
        elif node not in self.accounted and node.attr.value == "ops" and _OPS in self.names(node):
            self.escapes.append(self.span(node)[0])

    def visit_Name(self, node: cst.Name) -> None:
        if node not in self.accounted and node.value in self.ops_aliases and _OPS in self.names(node):
            self.escapes.append(self.span(node)[0])

    def operator_argument(self, call: cst.Call, *, creates: bool) -> None:
        argument = _argument(call)
        if argument is not None:
            self.operator(argument, creates=creates)

    def library_method(self, call: cst.Call) -> None:
        """A method of a ``Library`` takes names without a namespace, but also with its own."""
        argument = _argument(call)
        if argument is not None:
            self.literal_operator(self.resolved(argument), creates=False)

    def resolved(self, node: cst.BaseExpression) -> cst.BaseExpression:
        if isinstance(node, cst.Name) and node.value not in self.varying:
            return self.constants.get(node.value, node)
        return node

    def literal_operator(self, node: cst.BaseExpression, *, creates: bool) -> bool:
        """Note an expression whose value begins with ``namespace::``; false where it is something else."""
        leading = _leading_text(node)
        if leading is None:
            return False
        literal, offset, text = leading
        namespace, colons, rest = text.partition("::")
        if not (colons and namespace.isidentifier()):
            return False
        start = self.span(literal)[0] + offset
        op = re.match(r"\w+", rest)
        self.sites.append(Site(start, start + len(namespace), namespace, op[0] if op else None, creates))
        return True

    def operator(self, node: cst.BaseExpression, *, creates: bool) -> None:
        """An expression whose value is ``"namespace::operator"``, or an operator, or a ``Library``."""
        node = self.resolved(node)
        if self.literal_operator(node, creates=creates):
            return
        if isinstance(node, cst.Call) and any(
            name.endswith("_ops.add_op_namespace_prefix") for name in self.names(node.func)
        ):
            return
        if isinstance(node, cst.Name) and node.value in self.libraries:
            return
        # An operator itself may be handed on, but not something that may as well be its name.
        if (
            not creates
            and not _is_text(node)
            and not (isinstance(node, cst.Name) and node.value in self.varying)
        ):
            return
        raise self.refuse(
            node,
            "the namespace of this operator is only known when the code runs; write it out as "
            '"namespace::operator", or use add_op_namespace_prefix from ._ops',
        )

    def visit_Param(self, node: cst.Param) -> None:
        self.varying.add(node.name.value)

    def visit_For(self, node: cst.For) -> None:
        targets = node.target.elements if isinstance(node.target, cst.Tuple) else [node]
        for each in targets:
            target = each.target if isinstance(each, cst.For) else each.value
            if isinstance(target, cst.Name):
                self.varying.add(target.value)

    def library_argument(self, call: cst.Call) -> None:
        kinds = [each.value for each in call.args[1:2]] or [
            each.value for each in call.args if each.keyword is not None and each.keyword.value == "kind"
        ]
        implements = bool(kinds) and isinstance(kinds[0], cst.SimpleString) and kinds[0].raw_value == "IMPL"
        argument = _argument(call)
        if argument is not None:
            self.whole(argument, creates=not implements)

    def whole(self, node: cst.BaseExpression, *, creates: bool) -> None:
        """An expression whose value is a namespace."""
        node = self.resolved(node)
        if isinstance(node, cst.SimpleString) and node.raw_value.isidentifier():
            start = self.span(node)[0] + len(node.prefix) + len(node.quote)
            self.sites.append(Site(start, start + len(node.raw_value), node.raw_value, None, creates))
            return
        raise self.refuse(node, "this namespace is only known when the code runs; write it out as a string")

    # Imports ------------------------------------------------------------------------------------------

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        module = node.module
        if not node.relative and module is not None:
            first: cst.BaseExpression = module
            while isinstance(first, cst.Attribute):
                first = first.value
            if isinstance(first, cst.Name) and first.value == self.package:
                # The dot behind the package's name, if there is one, serves as the last of the relative dots.
                dots = self.depth if isinstance(module, cst.Attribute) else self.depth + 1
                self.imports.append(Edit(*self.span(first), b"." * dots))
            name = get_full_name_for_node(module)
            if name == "torch.ops":
                self.escapes.append(self.span(node)[0])
            if name == "torch.library" and isinstance(node.names, cst.ImportStar):
                raise self.refuse(
                    node, "this hides which operators are registered; import the names that are used"
                )
            if name == "torch" and not isinstance(node.names, cst.ImportStar):
                for each in node.names:
                    if each.name.value == "ops":
                        self.ops_aliases.add(each.evaluated_alias or "ops")
        return False

    def visit_Import(self, node: cst.Import) -> bool:
        full = [get_full_name_for_node(each.name) or "" for each in node.names]
        if any(name.partition(".")[0] == self.package for name in full):
            start, end = self.span(node)
            if b"\n" in self.file.data[start:end]:
                raise self.refuse(
                    node, "an import of the package itself over several lines; put it on one line"
                )
            no_comma = cst.MaybeSentinel.DEFAULT
            parts = [
                self.own_import(each, name)
                if name.partition(".")[0] == self.package
                else "import " + cst.Module([]).code_for_node(each.with_changes(comma=no_comma))
                for each, name in zip(node.names, full, strict=True)
            ]
            self.imports.append(Edit(start, end, "; ".join(parts).encode("utf-8")))
        return False

    def own_import(self, alias: cst.ImportAlias, name: str) -> str:
        parent, _, last = name.rpartition(".")
        if alias.evaluated_alias and parent:
            where = "." * (self.depth + 1) + ".".join(parent.split(".")[1:])
            return f"from {where} import {last} as {alias.evaluated_alias}"
        # No relative import binds the package itself. A kernel's top module is the first part of any of its
        # modules' names, and `__import__` returns it once all of the dotted name is imported.
        inner = name.partition(".")[2]
        rest = f' + ".{inner}"' if inner else ""
        return f'{alias.evaluated_alias or self.package} = __import__(__name__.partition(".")[0]{rest})'

    @property
    def depth(self) -> int:
        return self.file.path.count("/")


def _argument(call: cst.Call) -> cst.BaseExpression | None:
    """The argument that names the operator or the namespace: the first one, or that of its keyword."""
    for position, each in enumerate(call.args):
        if each.keyword is None:
            if position == 0 and not each.star:
                return each.value
        elif each.keyword.value in _NAME_KEYWORDS:
            return each.value
    return None


def _leading_text(node: cst.BaseExpression) -> tuple[cst.CSTNode, int, str] | None:
    """The literal text an expression's value begins with: its node, its offset there in bytes, and itself."""
    while True:
        if isinstance(node, cst.BinaryOperation | cst.ConcatenatedString):
            node = node.left
        elif (
            isinstance(node, cst.Call)
            and isinstance(node.func, cst.Attribute)
            and node.func.attr.value == "format"
        ):
            node = node.func.value
        else:
            break
    if isinstance(node, cst.SimpleString) and "b" not in node.prefix:
        return node, len(node.prefix) + len(node.quote), node.raw_value
    if (
        isinstance(node, cst.FormattedString)
        and node.parts
        and isinstance(node.parts[0], cst.FormattedStringText)
    ):
        return node, len(node.start), node.parts[0].value
    return None


def _is_text(node: cst.BaseExpression) -> bool:
    """Whether an expression is a string, or puts one together."""
    if isinstance(node, cst.BaseString | cst.BinaryOperation):
        return True
    return (
        isinstance(node, cst.Call)
        and isinstance(node.func, cst.Attribute)
        and node.func.attr.value in ("format", "join", "replace")
    )
