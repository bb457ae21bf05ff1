"""Functions of PyTorch that take the names of operators, and the argument of each that is one."""

from __future__ import annotations

import ast
from collections.abc import Iterable

# Those whose first argument names an operator: they bring it into being, or take one that exists (and then also
# accept the operator itself).
_CREATE = frozenset(
    (
        *(f"torch.library.{name}" for name in ("custom_op", "triton_op", "define")),
        "torch._library.custom_ops.custom_op",
        "torch._library.triton.triton_op",
    )
)
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
        "_impl",
        "_register_effectful_op",
    )
)
LIBRARIES = frozenset(("torch.library.Library", "torch.library._scoped_library"))
LIBRARY_METHODS = (
    "define",
    "impl",
    "fallback",
    "_impl_with_aoti_compile",
    "_register_effectful_op",
    "_register_fake",
    "_register_torch_dispatch_rule",
    "register_symm_mem_args",
)
_INSTANCES = frozenset(f"{library}()" for library in LIBRARIES)
_METHODS = frozenset(f"{instance}.{method}" for instance in _INSTANCES for method in LIBRARY_METHODS)
OPS = frozenset(("torch.ops", "torch._ops.ops"))
_KEYWORDS = ("qualname", "name", "op", "opname", "ns")
_METHOD_KEYWORDS = ("op_name", "schema")


def creates(names: Iterable[str]) -> bool:
    """True if one of these is a function that brings an operator into being."""
    return not _CREATE.isdisjoint(names)


def attaches(names: frozenset[str]) -> bool:
    """True if one of these is a function that takes an operator that exists, or its name."""
    return not names.isdisjoint(_ATTACH)


def dispatches(names: frozenset[str]) -> bool:
    """True if one of these is a function that asks PyTorch's dispatcher for an operator by its name."""
    return any(name.startswith("torch._C._dispatch_") for name in names)


def is_library(names: frozenset[str]) -> bool:
    """True for what may be an instance of ``Library``."""
    return not names.isdisjoint(_INSTANCES)


def is_library_method(names: frozenset[str]) -> bool:
    """True for a method of a ``Library`` that takes the name of an operator."""
    return not names.isdisjoint(_METHODS)


def naming_argument(call: ast.Call, *, method: bool = False) -> ast.expr | None:
    """The argument that names the operator or the namespace: the first one, or that of its keyword.

    Args:
        call: The call.
        method: True if it is one of a ``Library``'s methods.
    """
    if call.args:
        return None if isinstance(call.args[0], ast.Starred) else call.args[0]
    keywords = _METHOD_KEYWORDS if method else _KEYWORDS
    return next((keyword.value for keyword in call.keywords if keyword.arg in keywords), None)


def kind_argument(call: ast.Call) -> ast.expr | None:
    """The argument that is the kind of a ``Library``: ``DEF``, ``FRAGMENT`` or ``IMPL``."""
    kinds = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "kind")]
    return kinds[0] if kinds else None
