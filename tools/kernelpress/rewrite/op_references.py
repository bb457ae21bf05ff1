"""References to operators and their namespaces, found on the syntax trees of a package."""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

from kernelpress.rewrite.references import Definition, Problem, Reference
from kernelpress.rewrite.resolve import Resolver
from kernelpress.rewrite.torch_library import (
    LIBRARIES,
    OPS,
    attaches,
    creates,
    dispatches,
    is_library,
    is_library_method,
    library_kind,
    naming_argument,
    unpacks,
)
from kernelpress.syntax.expressions import is_text
from kernelpress.syntax.scopes import Module, Scope, ScopedVisitor

# Beginnings of the full names that matter; whoever names `torch` alone goes on with one of `_words`.
_INTEREST = ("torch.library", "torch.ops", "torch._")
_GETATTR = frozenset(f"builtins.{name}" for name in ("getattr", "hasattr", "setattr", "delattr"))
_TYPE_CHECKS = frozenset(("builtins.isinstance", "builtins.issubclass", "typing.cast"))

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
_PASSED_ON = (
    "this passes on a function that registers operators, which hides what it registers",
    "call it here by its own name or a name that is assigned once, or use it as a decorator",
)
_ELSEWHERE = (
    "{name} is taken from another module, and the build cannot see there what it stands for",
    "write the operator's name out there as a string, at the top of the module, and assign it once",
)


@dataclass(frozen=True)
class Wrapped:
    """The use of a function's parameter as a name that PyTorch takes."""

    # An unqualified name is one that a `Library` takes, with a namespace or without.
    kind: Literal["operator", "namespace", "unqualified"]
    creates: bool
    strict: bool = True
    exclusive: bool = False
    unnamed: bool = False


@dataclass
class Wrapper:
    """A function that hands parameters on as names of operators; ``uses`` holds file and line of each."""

    function: ast.FunctionDef
    uses: dict[tuple[str, Wrapped], tuple[str, int]]


@dataclass
class OpReferences:
    """References to operators in the files of a package, by their paths in the kernel.

    ``leaked_ops`` are lines where ``torch.ops`` itself is handed on, ``wrappers`` the package's functions that hand
    names on to PyTorch, and ``called`` those of them that it calls.
    """

    references: dict[str, set[Reference]] = field(default_factory=dict)
    leaked_ops: dict[str, list[int]] = field(default_factory=dict)
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    # Literals of whole namespaces that a variable holds, and expressions that are known to name an operator.
    namespaces: set[int] = field(default_factory=set)
    named: set[int] = field(default_factory=set)
    # Parameters whose value is a namespace.
    parameters: set[int] = field(default_factory=set)
    wrappers: dict[str, Wrapper] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)


def find_op_references(resolver: Resolver) -> OpReferences:
    """Find where the modules of a package name operators or their namespaces."""
    wrappers: dict[str, Wrapper] = {}
    uses = -1
    # A function's callers may stand before it, and be such functions themselves.
    while uses != (uses := sum(len(wrapper.uses) for wrapper in wrappers.values())):
        collected = OpReferences(wrappers=wrappers)
        for module in resolver.modules.values():
            OpReferenceFinder(module, resolver, collected).visit(module.file.tree)
    for full in wrappers.keys() - collected.called:
        for (_, use), (path, line) in wrappers[full].uses.items():
            if use.kind == "unqualified":
                continue
            reason = _RUN_TIME_OPERATOR if use.kind == "operator" else _RUN_TIME_NAMESPACE
            collected.problems.setdefault(path, []).append(Problem(line, *reason))
    return collected


class OpReferenceFinder(ScopedVisitor):
    """Collects the references that one module makes, which may be to constants of others."""

    def __init__(self, module: Module, resolver: Resolver, collected: OpReferences) -> None:
        super().__init__(module)
        self.resolver = resolver
        self.collected = collected
        self.text = module.file.text
        # Expressions that stand for `torch.ops` or for a function that defines operators, where that is no leak.
        self.accounted: set[int] = set()
        # Arguments of calls, where a class is not just compared with.
        self.arguments: set[int] = set()

        self.words = (
            None if module.stars else _words(_names_of_interest(module.scope, resolver, collected.wrappers))
        )

    def visit(self, node: ast.AST) -> None:
        """Leave out statements without any word that could matter: most of a file, and most of the time."""
        if self.words is not None and isinstance(node, ast.stmt) and not hasattr(node, "body"):
            start, end = self.text.span(node)
            if not self.words.search(self.text.data, start, end):
                return
        super().visit(node)

    # What an expression stands for ---------------------------------------------------------------------------

    def names(self, node: ast.AST) -> frozenset[str]:
        return self.resolver.names(node, self.scope)

    def is_ops(self, node: ast.AST) -> bool:
        return not OPS.isdisjoint(self.names(node))

    def is_operator(self, node: ast.AST, scope: Scope) -> bool:
        """True for an expression that stands for an operator itself or for what another library has, not for a name.

        What a function returns is neither, but for those that define an operator.
        """
        return any(
            name.startswith("torch.ops.")
            or creates((called := name.partition("("))[:1])
            or self.hides_names(called[0])
            or not (called[1] or self.resolver.is_own(name) or name.startswith("builtins."))
            or "_ops" in name.split(".")[:-1]
            for name in self.resolver.names(node, scope)
        )

    def is_helper(self, call: ast.Call, scope: Scope) -> bool:
        """True for a call of the helper in the generated ``_ops``."""
        return any(
            name.endswith("_ops.add_op_namespace_prefix") for name in self.resolver.names(call.func, scope)
        )

    # What is noted -------------------------------------------------------------------------------------------

    def refuse(self, node: ast.expr | ast.stmt, reason: tuple[str, str]) -> None:
        self.collected.problems.setdefault(self.module.file.path, []).append(Problem(node.lineno, *reason))

    def leak(self, node: ast.expr | ast.stmt) -> None:
        self.collected.leaked_ops.setdefault(self.module.file.path, []).append(node.lineno)

    def refuse_unresolved(self, name: ast.expr, scope: Scope, reason: tuple[str, str]) -> None:
        """Refuse a name that cannot be resolved, or that can in another module alone."""
        imported = sorted(full for full in self.names(name) if self.resolver.locate(full))
        if scope.module is not self.module or (imported and not is_text(name)):
            message, fix = _ELSEWHERE
            shown = repr(ast.unparse(name) if not imported else imported[0].rpartition(".")[2])
            reason = message.format(name=shown), fix
        self.refuse(name, reason)

    def reference(self, expression: ast.expr, literal: ast.expr, scope: Scope, reference: Reference) -> None:
        """Note a namespace that a literal begins with; ``expression`` is where this module needs it."""
        file = scope.module.file
        self.collected.named.update(map(id, ast.walk(expression)))
        if expression is not literal and _text(literal) == reference.namespace:
            self.collected.namespaces.add(id(literal))
        start = file.text.literal(literal, reference.namespace)
        if start is not None:
            end = start + len(reference.namespace.encode("utf-8"))
            references = self.collected.references.setdefault(file.path, set())
            references.add(replace(reference, start=start, end=end))
        elif scope.module is self.module:
            self.refuse(literal, _IN_PIECES)
        else:
            self.refuse_unresolved(expression, scope, _IN_PIECES)

    def literal_operator(
        self, expression: ast.expr, pieces: list[tuple[ast.expr, Scope]], *, creates: bool
    ) -> bool:
        """Note a text that begins with ``namespace::``; false where it is something else."""
        literals = list(takewhile(lambda piece: _text(piece[0]) is not None, pieces))
        if not literals:
            return False
        namespace, colons, rest = "".join(str(_text(node)) for node, _ in literals).partition("::")
        if not (colons and namespace.isidentifier()):
            return False
        # What follows the literals may go on with the name.
        op = re.match(r"\w+", rest) if len(literals) == len(pieces) else None
        unnamed = creates and op is None
        reference = Reference(0, 0, namespace, op[0] if op else None, creates, unnamed=unnamed)
        self.reference(expression, *literals[0], reference)
        return True

    def operator(self, expression: ast.expr, *, creates: bool, strict: bool = True) -> None:
        """Note an expression whose value is ``"namespace::operator"``, or an operator, or a ``Library``."""
        pieces = self.resolver.text_pieces(expression, self.scope)
        if self.literal_operator(expression, pieces, creates=creates) or is_library(self.names(expression)):
            return
        node, scope = pieces[0] if pieces else (expression, self.scope)
        if isinstance(node, ast.Call) and self.is_helper(node, scope):
            return
        if not creates and (
            self.is_operator(expression, self.scope) or (not strict and not is_text(expression))
        ):
            return
        if len(pieces) == 1:
            wrapped = self.wrapped(expression, node, scope, Wrapped("operator", creates, strict))
        else:
            colons = len(pieces) == 2 and (_text(pieces[1][0]) or "").startswith("::")
            wrapped = colons and self.wrapped(
                expression, node, scope, Wrapped("namespace", creates, unnamed=creates)
            )
        if not wrapped:
            self.refuse_unresolved(expression, scope, _RUN_TIME_OPERATOR)

    def namespace(
        self, expression: ast.expr, *, creates: bool, exclusive: bool = False, unnamed: bool = False
    ) -> None:
        """Note an expression whose value is a namespace."""
        node, scope = self.resolver.constant(expression, self.scope)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            reference = Reference(0, 0, node.value, None, creates, exclusive, unnamed)
            self.reference(expression, node, scope, reference)
        elif not (
            any(isinstance(part, ast.Call) and self.is_helper(part, scope) for part in ast.walk(node))
            or self.wrapped(
                expression, node, scope, Wrapped("namespace", creates, exclusive=exclusive, unnamed=unnamed)
            )
        ):
            self.refuse_unresolved(expression, scope, _RUN_TIME_NAMESPACE)

    def unqualified(self, expression: ast.expr) -> None:
        """Note the name of an operator that a ``Library`` takes, which may have a namespace."""
        pieces = self.resolver.text_pieces(expression, self.scope)
        if not self.literal_operator(expression, pieces, creates=False) and pieces:
            # The name may go on after it: a schema.
            self.wrapped(expression, *pieces[0], Wrapped("unqualified", creates=False))

    def definition(self, call: ast.Call, expression: ast.expr) -> None:
        """Note the operator that a ``Library`` defines, where its namespace and its schema are written out."""
        method, scope = self.resolver.constant(call.func, self.scope)
        if not (isinstance(method, ast.Attribute) and method.attr == "define"):
            return
        library, scope = self.resolver.constant(method.value, scope)
        name = naming_argument(library) if isinstance(library, ast.Call) else None
        namespaces = self.resolver.text_pieces(name, scope) if name else []
        schemas = self.resolver.text_pieces(expression, self.scope)
        op = re.match(r"\w+(?:\.\w+)?", (_text(schemas[0][0]) or "").rpartition("::")[2]) if schemas else None
        if op and len(namespaces) == 1 and (namespace := _text(namespaces[0][0])):
            definition = Definition(call.lineno, namespace, op[0])
            self.collected.definitions.setdefault(self.module.file.path, []).append(definition)

    # Functions of the package around those of PyTorch ----------------------------------------------------------

    def wrapped(self, expression: ast.expr, name: ast.expr, scope: Scope, use: Wrapped) -> bool:
        """Note a parameter of a function that is used as a name, which its callers give; false for all else."""
        if not isinstance(name, ast.Name) or (binding := scope.lookup(name.id)) is None:
            return False
        holder, bindings = binding
        function = holder.node
        if (
            len(bindings) != 1
            or not isinstance(bindings[0], ast.arg)
            or not isinstance(function, ast.FunctionDef)
            or function.decorator_list
            or holder.parent is not holder.module.scope
            or len(holder.parent.bindings[function.name]) != 1
        ):
            return False
        self.collected.named.update(map(id, ast.walk(expression)))
        full = f"{holder.module.name}:{function.name}"
        place = self.module.file.path, expression.lineno
        wrapper = self.collected.wrappers.setdefault(full, Wrapper(function, {}))
        wrapper.uses.setdefault((bindings[0].arg, use), place)
        if use.kind == "namespace" and use.creates:
            self.collected.parameters.add(id(bindings[0]))
        return True

    def call_of_wrapper(self, call: ast.Call, full: str) -> None:
        """Note what a call of a function that passes its argument on as a name gives it."""
        self.collected.called.add(full)
        wrapper = self.collected.wrappers[full]
        for parameter, use in list(wrapper.uses):
            argument = _argument(call, wrapper.function.args, parameter)
            if use.kind == "unqualified":
                if argument is not None:
                    self.unqualified(argument)
            elif argument is None:
                self.refuse(call, _RUN_TIME_OPERATOR if use.kind == "operator" else _RUN_TIME_NAMESPACE)
            elif use.kind == "operator":
                self.operator(argument, creates=use.creates, strict=use.strict)
            else:
                self.namespace(argument, creates=use.creates, exclusive=use.exclusive, unnamed=use.unnamed)

    # Where names stand ---------------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> None:
        called = self.names(node.func)
        self.accounted.add(id(node.func))
        if called & _GETATTR:
            if len(node.args) > 1 and self.is_ops(node.args[0]):
                self.accounted.add(id(node.args[0]))
                self.namespace(node.args[1], creates=False)
            elif id(node) not in self.accounted and self.is_ops(node):
                self.leak(node)
        elif any(name.startswith("torch.") for name in called):
            self.call_of_torch(node, called)
        for full in called & self.collected.wrappers.keys():
            self.call_of_wrapper(node, full)
        if not called & _TYPE_CHECKS:
            self.arguments.update(map(id, node.args))
        self.generic_visit(node)

    def call_of_torch(self, call: ast.Call, called: frozenset[str]) -> None:
        """Note what a call of one of PyTorch's functions names of operators."""
        method = is_library_method(called)
        argument = naming_argument(call, method=method)
        if method:
            if argument is not None:
                self.unqualified(argument)
                self.definition(call, argument)
        elif creates(called) or attaches(called):
            if argument is None and unpacks(call):
                self.refuse(call, _RUN_TIME_OPERATOR)
            if argument is not None:
                self.operator(argument, creates=creates(called))
                if is_library(self.names(argument)) and len(call.args) > 1:
                    self.unqualified(call.args[1])
        elif called & LIBRARIES:
            if argument is None and unpacks(call):
                self.refuse(call, _RUN_TIME_NAMESPACE)
            if argument is not None:
                kind = library_kind(call)
                self.namespace(argument, creates=kind != "IMPL", exclusive=kind == "DEF")
        elif argument is not None and dispatches(called):
            self.operator(argument, creates=False, strict=False)

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign) -> None:
        """A variable of a function or a module that is assigned ``torch.ops``, or a function, is followed."""
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if (
            node.value is not None
            and not isinstance(self.scope.node, ast.ClassDef)
            and all(
                isinstance(target, ast.Name) and target.id not in self.module.rebound for target in targets
            )
        ):
            self.accounted.add(id(node.value))
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit_Assign(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """A value that is compared with another, such as ``None``, is not passed on."""
        self.accounted.update(map(id, (node.left, *node.comparators)))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if bases := self.names(node.value):
            if OPS.isdisjoint(bases):
                self.passed_on(node)
            else:
                self.attribute_of_ops(node)
        self.generic_visit(node)

    def attribute_of_ops(self, node: ast.Attribute) -> None:
        self.accounted.add(id(node.value))
        end = self.text.span(node)[1]
        start = end - len(node.attr.encode("utf-8"))
        if node.attr.startswith("__"):
            self.leak(node)
        elif self.text.data[start:end] != node.attr.encode("utf-8"):
            # Python takes letters for others that look alike.
            self.refuse(node, _IN_PIECES)
        else:
            references = self.collected.references.setdefault(self.module.file.path, set())
            references.add(Reference(start, end, node.attr))

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.passed_on(node)

    def hides_names(self, full: str) -> bool:
        """True for a function of the package that takes names which always have a namespace."""
        wrapper = self.collected.wrappers.get(full)
        return wrapper is not None and any(use.kind != "unqualified" for _, use in wrapper.uses)

    def passed_on(self, node: ast.Attribute | ast.Name) -> None:
        """Report an expression that hands on what must be seen to be used."""
        if id(node) in self.accounted:
            return
        names = self.names(node)
        if not OPS.isdisjoint(names):
            self.leak(node)
        elif (
            creates(names)
            or attaches(names)
            or any(self.hides_names(name) for name in names)
            or (id(node) in self.arguments and names & LIBRARIES)
        ):
            self.refuse(node, _PASSED_ON)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "torch.ops" and not node.level:
            self.leak(node)
        if node.module == "torch.library" and not node.level and node.names[0].name == "*":
            self.refuse(node, _HIDDEN)

    def visit_Return(self, node: ast.Return) -> None:
        """A module's ``__getattr__`` hands out what importing from the module is known to give."""
        if (
            getattr(self.scope.node, "name", "") == "__getattr__"
            and self.scope.parent is self.module.scope
            and isinstance(node.value, ast.Name)
            and node.value.id in self.module.scope.bindings
        ):
            self.accounted.add(id(node.value))
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.accounted.update(map(id, node.decorator_list))
        super().visit_FunctionDef(node)


def _names_of_interest(scope: Scope, resolver: Resolver, wrappers: Container[str]) -> Iterator[str]:
    """Names in a scope, and those within it, that stand for PyTorch's workings or for something in the package."""
    for name, bindings in scope.bindings.items():
        fulls = resolver.names(ast.Name(name, ast.Load()), scope)
        if any(
            full.startswith(_INTEREST) or (resolver.is_own(full) and ":" not in full) or full in wrappers
            for full in fulls
        ):
            yield name
        for binding in bindings:
            if isinstance(binding, ast.stmt):
                yield from _names_of_interest(scope.module.within(binding, scope), resolver, wrappers)


def _words(names: Iterable[str]) -> re.Pattern[bytes]:
    """Any of some names, or of the words without which no operator is named; bytes beyond ASCII are letters."""
    words = sorted({"ops", "_ops", "library", "_library", "_C", *names})
    alternatives = b"|".join(re.escape(word.encode("utf-8")) for word in words)
    return re.compile(rb"(?<![\w\x80-\xff])(?:%s)(?![\w\x80-\xff])" % alternatives)


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _argument(call: ast.Call, parameters: ast.arguments, name: str) -> ast.expr | None:
    """The argument that a call gives a parameter; ``None`` where that cannot be told."""
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return None
    names = [parameter.arg for parameter in (*parameters.posonlyargs, *parameters.args)]
    if name in names[: len(call.args)]:
        return call.args[names.index(name)]
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
