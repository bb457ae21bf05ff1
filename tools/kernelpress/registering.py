"""Functions of PyTorch that take the names of operators, and which of their arguments is one."""

from __future__ import annotations

import ast
import re

# Those whose first argument names an operator: they bring it into being, or take one that exists (and then also
# accept the operator itself).
_CREATE = re.compile(
    r"torch\.library\.(custom_op|triton_op|define)|torch\._library\.(custom_ops\.custom_op|triton\.triton_op)"
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
# PyTorch's own workings take names in many places; what else they take as a text may be anything.
_WORKINGS = ("torch._C.", "torch._library.", "torch._custom_op.", "torch._custom_ops.", "torch._ops.")
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
OPS = frozenset(("torch.ops", "torch._ops.ops"))
_KEYWORDS = ("qualname", "name", "op", "opname", "ns")
_METHOD_KEYWORDS = ("op_name", "schema")


def creates(called: frozenset[str]) -> bool:
    """Whether a function of one of these names brings an operator into being."""
    return any(_CREATE.fullmatch(name) for name in called)


def attaches(called: frozenset[str]) -> bool:
    """Whether a function of one of these names takes an operator that exists, or its name."""
    return not called.isdisjoint(_ATTACH)


def dispatches(called: frozenset[str]) -> bool:
    """Whether a function of one of these names asks PyTorch's dispatcher for an operator by its name."""
    return any(name.startswith("torch._C._dispatch_") for name in called)


def may_take_names(called: frozenset[str]) -> bool:
    """Whether a function of one of these names may take the name of an operator, or any other text."""
    return any(name.startswith(_WORKINGS) for name in called)


def naming_argument(call: ast.Call, *, method: bool = False, skip: int = 0) -> ast.expr | None:
    """The argument that names the operator or the namespace: the first one, or that of its keyword.

    Args:
        call: The call.
        method: Whether it is one of a ``Library``'s methods.
        skip: How many arguments come before that one.
    """
    if len(call.args) > skip:
        return None if isinstance(call.args[skip], ast.Starred) else call.args[skip]
    keywords = _METHOD_KEYWORDS if method else _KEYWORDS
    return next((each.value for each in call.keywords if each.arg in keywords), None)


def unpacks(call: ast.Call) -> bool:
    """Whether a call gets arguments out of a list or a dictionary."""
    return any(isinstance(each, ast.Starred) for each in call.args) or any(
        each.arg is None for each in call.keywords
    )


def implements(call: ast.Call, skip: int) -> bool:
    """Whether a ``Library`` is one for operators that exist."""
    kinds = [*call.args[skip + 1 : skip + 2], *(each.value for each in call.keywords if each.arg == "kind")]
    return bool(kinds) and isinstance(kinds[0], ast.Constant) and kinds[0].value == "IMPL"
