"""Names of operators and namespaces that an expression gives PyTorch, read from where they are written."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from itertools import takewhile

from kernelpress.rewrite.references import Definition, OpReferences, Problem, Reference, Wrapped, Wrapper
from kernelpress.rewrite.resolve import Resolver
from kernelpress.rewrite.torch_library import creates as creates_operator
from kernelpress.rewrite.torch_library import is_library, kind_argument, naming_argument
from kernelpress.syntax.expressions import argument_of, default_of, is_text, unpacks
from kernelpress.syntax.scopes import Module, Scope

Reason = tuple[str, str]
RUN_TIME_OPERATOR = (
    "the namespace of this operator is only known when the code runs",
    'write it out as "namespace::operator", give the operator itself, or use add_op_namespace_prefix from ._ops',
)
RUN_TIME_NAMESPACE = ("this namespace is only known when the code runs", "write it out as a string")
IN_PIECES = ("this name is put together of pieces or written with escapes", "write it in one piece")
_ELSEWHERE = (
    "{name} is taken from another module, and the build cannot see there what it stands for",
    "write the operator's name out there as a string, at the top of the module, and assign it once",
)


class NameReader:
    """Collects what expressions of one module name; what they name may be written in another."""

    def __init__(self, module: Module, resolver: Resolver, collected: OpReferences) -> None:
        self.module = module
        self.resolver = resolver
        self.collected = collected

    # What an expression stands for ---------------------------------------------------------------------------

    def is_operator(self, node: ast.AST, scope: Scope) -> bool:
        """True for an expression that stands for an operator itself or for what another library has, not for a name.

        What a function returns is neither, but for those that define an operator.
        """
        return any(
            name.startswith("torch.ops.")
            or creates_operator((called := name.partition("("))[:1])
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

    def hides_names(self, full: str) -> bool:
        """True for a function of the package that takes names which always have a namespace."""
        wrapper = self.collected.wrappers.get(full)
        return wrapper is not None and any(use.kind != "unqualified" for _, use in wrapper.uses)

    # What is noted -------------------------------------------------------------------------------------------

    def refuse(self, node: ast.expr | ast.stmt, reason: Reason) -> None:
        self.collected.problem(self.module.file.path, Problem(node.lineno, *reason))

    def refuse_unresolved(self, name: ast.expr, scope: Scope, origin: Scope, reason: Reason) -> None:
        """Refuse a name that cannot be resolved, or that can in another module alone."""
        imported = sorted(
            full for full in self.resolver.names(name, scope) if self.resolver.locate(full) is not None
        )
        if origin.module is not self.module or (imported and not is_text(name)):
            message, fix = _ELSEWHERE
            shown = repr(ast.unparse(name) if not imported else imported[0].rpartition(".")[2])
            reason = message.format(name=shown), fix
        self.refuse(name, reason)

    def reference(
        self,
        expression: ast.expr,
        scope: Scope,
        literal: ast.expr,
        origin: Scope,
        reference: Reference,
    ) -> None:
        """Note a namespace that a literal begins with; ``expression`` is where this module needs it."""
        file = origin.module.file
        self.collected.named.update(map(id, ast.walk(expression)))
        start = file.text.literal(literal, reference.namespace)
        if start is not None:
            end = start + len(reference.namespace.encode("utf-8"))
            references = self.collected.references.setdefault(file.path, set())
            references.add(replace(reference, start=start, end=end))
            first, last = self.module.file.text.span(expression)
            if origin.module is not self.module or not first <= start < last:
                self.collected.variables.setdefault(file.path, set()).add(start)
        elif origin.module is self.module:
            self.refuse(literal, IN_PIECES)
        else:
            self.refuse_unresolved(expression, scope, origin, IN_PIECES)

    def literal_operator(
        self,
        expression: ast.expr,
        scope: Scope,
        pieces: list[tuple[ast.expr, Scope]],
        *,
        creates: bool,
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
        self.reference(expression, scope, *literals[0], reference)
        return True

    def operator(self, expression: ast.expr, scope: Scope, *, creates: bool, strict: bool = True) -> None:
        """Note an expression whose value is ``"namespace::operator"``, or an operator, or a ``Library``."""
        pieces = self.resolver.text_pieces(expression, scope)
        if self.literal_operator(expression, scope, pieces, creates=creates) or is_library(
            self.resolver.names(expression, scope)
        ):
            return
        node, origin = pieces[0] if pieces else (expression, scope)
        if isinstance(node, ast.Call) and self.is_helper(node, origin):
            return
        if not creates and (self.is_operator(expression, scope) or (not strict and not is_text(expression))):
            return
        if len(pieces) == 1:
            wrapped = self.wrapped(expression, node, origin, Wrapped("operator", creates, strict))
        else:
            colons = len(pieces) == 2 and (_text(pieces[1][0]) or "").startswith("::")
            wrapped = colons and self.wrapped(
                expression, node, origin, Wrapped("namespace", creates, unnamed=creates)
            )
        if not wrapped:
            self.refuse_unresolved(expression, scope, origin, RUN_TIME_OPERATOR)

    def namespace(self, expression: ast.expr, scope: Scope, use: Wrapped) -> None:
        """Note an expression whose value is a namespace; ``use`` tells what for."""
        node, origin = self.resolver.constant(expression, scope)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            reference = Reference(0, 0, node.value, None, use.creates, use.exclusive, use.unnamed)
            self.reference(expression, scope, node, origin, reference)
        elif not (
            any(isinstance(part, ast.Call) and self.is_helper(part, origin) for part in ast.walk(node))
            or self.wrapped(expression, node, origin, use)
        ):
            self.refuse_unresolved(expression, scope, origin, RUN_TIME_NAMESPACE)

    def library(self, call: ast.Call, expression: ast.expr, scope: Scope) -> None:
        """Note the namespace of a ``Library`` that a call makes."""
        kind = kind_argument(call)
        node, origin = self.resolver.constant(kind, scope) if kind else (ast.Constant(""), scope)
        parameter = origin.parameter(node.id) if isinstance(node, ast.Name) else None
        text = _text(node)
        # What cannot be read may be any kind, if it is not a parameter that the callers give.
        use = Wrapped(
            "namespace",
            text != "IMPL",
            exclusive=text in ("DEF", None),
            mode=parameter[1].arg if parameter else "",
        )
        self.namespace(expression, scope, use)

    def unqualified(self, expression: ast.expr, scope: Scope) -> None:
        """Note the name of an operator that a ``Library`` takes, which may have a namespace."""
        pieces = self.resolver.text_pieces(expression, scope)
        if not self.literal_operator(expression, scope, pieces, creates=False) and pieces:
            # The name may go on after it: a schema.
            self.wrapped(expression, *pieces[0], Wrapped("unqualified", creates=False))

    def definition(
        self, call: ast.Call, library: tuple[ast.expr, Scope], schema: tuple[ast.expr, Scope]
    ) -> None:
        """Note the operator that a ``Library`` defines, as far as its namespace and its schema are written out."""
        is_known = is_library(self.resolver.names(*library))
        value, origin = self.resolver.constant(*library)
        name = naming_argument(value) if isinstance(value, ast.Call) else None
        namespaces = self.resolver.text_pieces(name, origin) if name and is_known else []
        namespace = _text(namespaces[0][0]) if len(namespaces) == 1 else None
        schemas = self.resolver.text_pieces(*schema)
        literals = list(takewhile(lambda piece: _text(piece[0]) is not None, schemas))
        text = "".join(str(_text(node)) for node, _ in literals)
        op = re.match(r"(?:\w+::)?(\w+(?:\.\w+)?)(?=\s*\(|$)", text)
        known = op is not None and ("(" in text or len(literals) == len(schemas))
        # An unknown object that takes some other text is no library.
        if "(" in text or not literals or is_known:
            definitions = self.collected.definitions.setdefault(self.module.file.path, [])
            definitions.append(Definition(call.lineno, namespace, op[1] if op and known else None))

    # Functions of the package around those of PyTorch ----------------------------------------------------------

    def wrapped(self, expression: ast.expr, name: ast.expr, scope: Scope, use: Wrapped) -> bool:
        """Note a parameter of a function that is used as a name, which its callers give; false for all else."""
        binding = scope.parameter(name.id) if isinstance(name, ast.Name) else None
        if binding is None:
            return False
        holder, parameter = binding
        function = holder.node
        if (
            not isinstance(function, ast.FunctionDef)
            or function.decorator_list
            or holder.parent is not holder.module.scope
            or len(holder.parent.bindings[function.name]) != 1
        ):
            return False
        self.collected.named.update(map(id, ast.walk(expression)))
        full = f"{holder.module.name}:{function.name}"
        place = self.module.file.path, expression.lineno
        wrapper = self.collected.wrappers.setdefault(full, Wrapper(function, {}))
        wrapper.uses.setdefault((parameter.arg, use), place)
        if use.creates and use.kind != "unqualified":
            self.collected.parameters[id(parameter)] = use.kind
        return True

    def call_of_wrapper(self, call: ast.Call, full: str, scope: Scope) -> None:
        """Note what a call of a function that passes its argument on as a name gives it."""
        self.collected.called.add(full)
        wrapper = self.collected.wrappers[full]
        for parameter, use in list(wrapper.uses):
            argument, origin = self.argument(call, full, parameter, scope)
            reader = NameReader(origin.module, self.resolver, self.collected)
            if use.kind == "unqualified":
                if argument is not None:
                    reader.unqualified(argument, origin)
            elif argument is None:
                self.refuse(call, RUN_TIME_OPERATOR if use.kind == "operator" else RUN_TIME_NAMESPACE)
            elif use.kind == "operator":
                reader.operator(argument, origin, creates=use.creates, strict=use.strict)
            else:
                if use.mode:
                    kind, place = self.argument(call, full, use.mode, scope)
                    text = _text(self.resolver.constant(kind, place)[0]) if kind else None
                    use = replace(use, creates=text != "IMPL", exclusive=text in ("DEF", None), mode="")
                reader.namespace(argument, origin, use)

    def argument(self, call: ast.Call, full: str, name: str, scope: Scope) -> tuple[ast.expr | None, Scope]:
        """The expression that gives a function's parameter its value in a call, or its default, with its scope."""
        parameters = self.collected.wrappers[full].function.args
        argument = argument_of(call, parameters, name)
        if argument is not None or unpacks(call):
            return argument, scope
        return default_of(parameters, name), self.resolver.modules[full.partition(":")[0]].scope


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
