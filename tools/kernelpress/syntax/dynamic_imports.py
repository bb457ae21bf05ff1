"""Modules that an expression names by a string: to import them, or to look them up."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from kernelpress.syntax.scopes import Scope

IMPORTERS = frozenset(("importlib.import_module", "builtins.__import__", "importlib.__import__"))
_READERS = frozenset(
    (
        *(
            f"importlib.resources.{name}"
            for name in (
                "contents", "files", "is_resource", "open_binary", "open_text", "path", "read_binary", "read_text",
            )
        ),
        "importlib.util.find_spec",
        *(f"pkgutil.{name}" for name in ("find_loader", "get_data", "get_loader")),
        *(f"sys.modules.{name}" for name in ("__contains__", "__getitem__", "get", "pop", "setdefault")),
    )
)  # fmt: skip
_KEYWORDS = ("name", "package", "anchor", "fullname")
# A source without any of these holds no such expression.
_MENTIONS = re.compile(
    rb"import_module|__import__|\bresources\b|find_spec|pkgutil|\bsys\s*\.\s*modules|from\s+sys\s+import|\bsys\s+as\b"
)


class Named(NamedTuple):
    """A string that names a module.

    ``does`` is ``"import"`` where it is imported, or ``"look up"`` where it is asked for otherwise. ``alone`` is
    whether putting another module's name there is all that it takes.
    """

    name: ast.expr
    does: Literal["import", "look up"]
    alone: bool


def may_name(data: bytes) -> bool:
    """True if a source may hold an expression that ``named`` knows."""
    return _MENTIONS.search(data) is not None


def named(node: ast.expr, names: Callable[[ast.AST], frozenset[str]]) -> Named | None:
    """The name of a module in a call, a subscript or a comparison; ``None`` if there is none.

    Args:
        node: The expression.
        names: Gives the full dotted names that an expression may stand for.
    """
    if isinstance(node, ast.Call):
        return _in_call(node, names(node.func))
    if isinstance(node, ast.Subscript) and "sys.modules" in names(node.value):
        return Named(node.slice, "look up", True)
    if (
        isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.In | ast.NotIn)
        and "sys.modules" in names(node.comparators[0])
    ):
        return Named(node.left, "look up", True)
    return None


def _in_call(call: ast.Call, called: frozenset[str]) -> Named | None:
    imports = bool(called & IMPORTERS)
    if not imports and not called & _READERS:
        return None
    first = _argument(call, 0, *(("name",) if imports else _KEYWORDS))
    if first is None or isinstance(first, ast.Starred):
        return None
    if not imports:
        return Named(first, "look up", True)
    if isinstance(first, ast.Constant) and str(first.value).startswith("."):
        package = _argument(call, 1, "package")
        # A relative name is one of the kernel's; what it is relative to may be written out.
        return None if package is None else Named(package, "look up", True)
    alone = "importlib.import_module" in called and len(call.args) + len(call.keywords) == 1
    return Named(first, "import", alone)


def _argument(call: ast.Call, position: int, *keywords: str) -> ast.expr | None:
    if len(call.args) > position:
        return call.args[position]
    return next((keyword.value for keyword in call.keywords if keyword.arg in keywords), None)


def readings(name: ast.expr, scope: Scope) -> list[ast.expr]:
    """The expressions that a module's name may be read from.

    Those are all that a variable is assigned; of what else binds a variable, such as a loop, nothing is known.
    """
    located = scope.lookup(name.id) if isinstance(name, ast.Name) else None
    bindings = located[1] if located else [None]
    assigned = [binding for binding in bindings if isinstance(binding, ast.expr)]
    return assigned if len(assigned) == len(bindings) else [*assigned, name]
