"""References to operators and their namespaces, found on the syntax trees of a package."""

from __future__ import annotations

import ast
from collections.abc import Container

from kernelpress.rewrite.op_names import IN_PIECES, RUN_TIME_NAMESPACE, RUN_TIME_OPERATOR, NameReader
from kernelpress.rewrite.references import OpReferences, Problem, Reference, Wrapped, Wrapper
from kernelpress.rewrite.resolve import Resolver
from kernelpress.rewrite.torch_library import (
    LIBRARIES,
    LIBRARY_METHODS,
    OPS,
    attaches,
    creates,
    dispatches,
    is_library,
    is_library_method,
    naming_argument,
)
from kernelpress.rewrite.variables import WordVisitor, body_span, words_pattern
from kernelpress.syntax.expressions import unpacks
from kernelpress.syntax.scopes import Module, Scope

# Beginnings of the full names that matter; whoever names `torch` alone goes on with another word.
_INTEREST = ("torch.library", "torch.ops", "torch._")
_WORDS = frozenset(("ops", "_ops", "library", "_library", "_C", "define", "impl"))
_GETATTR = frozenset(f"builtins.{name}" for name in ("getattr", "hasattr", "setattr", "delattr"))
_TYPE_CHECKS = frozenset(("builtins.isinstance", "builtins.issubclass", "typing.cast"))

_HIDDEN = (
    "this hides which operators are registered",
    "import the names that are used from torch.library",
)
_PASSED_ON = (
    "this passes on a function that registers operators, which hides what it registers",
    "call it here by its own name or a name that is assigned once, or use it as a decorator",
)


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
            reason = RUN_TIME_OPERATOR if use.kind == "operator" else RUN_TIME_NAMESPACE
            collected.problem(path, Problem(line, *reason))
    return collected


class OpReferenceFinder(WordVisitor):
    """Collects the references that one module makes, which may be to constants of others."""

    def __init__(self, module: Module, resolver: Resolver, collected: OpReferences) -> None:
        words = _words(module.scope, resolver, collected.wrappers, _WORDS) if not module.stars else None
        super().__init__(module, words_pattern(words) if words else None)
        self.resolver = resolver
        self.collected = collected
        self.reader = NameReader(module, resolver, collected)
        self.text = module.file.text
        # Expressions that stand for `torch.ops` or for a function that defines operators, where that is no leak.
        self.accounted: set[int] = set()
        # Arguments of calls, where a class is not just compared with.
        self.arguments: set[int] = set()

    def names(self, node: ast.AST) -> frozenset[str]:
        return self.resolver.names(node, self.scope)

    def is_ops(self, node: ast.AST) -> bool:
        return not OPS.isdisjoint(self.names(node))

    def leak(self, node: ast.expr | ast.stmt) -> None:
        self.collected.leaked_ops.setdefault(self.module.file.path, []).append(node.lineno)

    # Where names stand ---------------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> None:
        called = self.names(node.func)
        self.accounted.add(id(node.func))
        if called & _GETATTR:
            if len(node.args) > 1 and self.is_ops(node.args[0]):
                self.accounted.add(id(node.args[0]))
                self.reader.namespace(node.args[1], self.scope, Wrapped("namespace", creates=False))
            elif id(node) not in self.accounted and self.is_ops(node):
                self.leak(node)
        elif any(name.startswith("torch.") for name in called):
            self.call_of_torch(node, called)
        elif isinstance(node.func, ast.Attribute) and node.func.attr in LIBRARY_METHODS:
            self.call_of_unknown(node, node.func)
        for full in called & self.collected.wrappers.keys():
            self.reader.call_of_wrapper(node, full, self.scope)
        if not called & _TYPE_CHECKS:
            self.arguments.update(map(id, node.args))
        self.generic_visit(node)

    def call_of_torch(self, call: ast.Call, called: frozenset[str]) -> None:
        """Note what a call of one of PyTorch's functions names of operators."""
        method = is_library_method(called)
        argument = naming_argument(call, method=method)
        if method:
            if argument is not None:
                self.reader.unqualified(argument, self.scope)
                if any(name.endswith(".define") for name in called):
                    self.definition(call, argument)
        elif creates(called) or attaches(called):
            if argument is None and unpacks(call):
                self.reader.refuse(call, RUN_TIME_OPERATOR)
            if argument is not None:
                self.reader.operator(argument, self.scope, creates=creates(called))
                if is_library(self.names(argument)) and len(call.args) > 1:
                    self.reader.unqualified(call.args[1], self.scope)
                    if creates(called):
                        self.reader.definition(call, (argument, self.scope), (call.args[1], self.scope))
        elif called & LIBRARIES:
            if argument is None and unpacks(call):
                self.reader.refuse(call, RUN_TIME_NAMESPACE)
            if argument is not None:
                self.reader.library(call, argument, self.scope)
        elif argument is not None and dispatches(called):
            self.reader.operator(argument, self.scope, creates=False, strict=False)

    def definition(self, call: ast.Call, schema: ast.expr) -> None:
        method, scope = self.resolver.constant(call.func, self.scope)
        library = method.value if isinstance(method, ast.Attribute) else method
        self.reader.definition(call, (library, scope), (schema, self.scope))

    def call_of_unknown(self, call: ast.Call, method: ast.Attribute) -> None:
        """Note a call of what has the name of one of a ``Library``'s methods, on what may be one."""
        argument = naming_argument(call, method=True)
        owners = self.names(method.value)
        if argument is None or not all(
            self.resolver.is_own(owner) or owner.startswith("builtins.") for owner in owners
        ):
            return
        if method.attr == "define":
            self.definition(call, argument)
        first, scope = (self.resolver.text_pieces(argument, self.scope) or [(argument, self.scope)])[0]
        parameter = scope.parameter(first.id) if isinstance(first, ast.Name) else None
        if parameter is not None:
            self.collected.registrars.add(getattr(parameter[0].node, "name", ""))

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
            self.reader.refuse(node, IN_PIECES)
        else:
            references = self.collected.references.setdefault(self.module.file.path, set())
            references.add(Reference(start, end, node.attr))

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.passed_on(node)

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
            or any(self.reader.hides_names(name) for name in names)
            or (id(node) in self.arguments and names & LIBRARIES)
        ):
            self.reader.refuse(node, _PASSED_ON)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "torch.ops" and not node.level:
            self.leak(node)
        if node.module == "torch.library" and not node.level and node.names[0].name == "*":
            self.reader.refuse(node, _HIDDEN)

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


def _words(
    scope: Scope, resolver: Resolver, wrappers: Container[str], words: frozenset[str]
) -> frozenset[str]:
    """Words of which a statement has one that matters, with the names for PyTorch's workings in a scope and within."""
    names = {
        name
        for name in scope.bindings
        for full in resolver.names(ast.Name(name, ast.Load()), scope)
        if full.startswith(_INTEREST) or (resolver.is_own(full) and ":" not in full) or full in wrappers
    }
    words |= names
    file = scope.module.file
    pattern = words_pattern(words | {"import"})
    for bindings in list(scope.bindings.values()):
        for binding in bindings:
            # A function without any of the words gives nothing that matters a name.
            if isinstance(binding, ast.stmt) and pattern.search(file.data, *body_span(file, binding)):
                words |= _words(scope.module.within(binding, scope), resolver, wrappers, words)
    return words
