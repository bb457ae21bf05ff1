"""References to operators in a file, and places that cannot be followed."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

# PyTorch's own: a package may extend them, but they are never its own to rename.
_FOREIGN = frozenset(
    (
        "aten",
        "prim",
        "prims",
        "quantized",
        "c10d",
        "_c10d_functional",
        "inductor",
        "torchvision",
        "torchaudio",
    )
)


@dataclass(frozen=True)
class Reference:
    """The namespace of an operator as it stands in a file, at a range of bytes; ``creates`` where it is defined.

    ``exclusive`` is true for a ``Library`` of kind ``DEF``, of which PyTorch allows one for a namespace, ``unnamed``
    where an operator is created whose name is only known when the code runs.
    """

    start: int
    end: int
    namespace: str
    op: str | None = None
    creates: bool = False
    exclusive: bool = False
    unnamed: bool = False


def own_namespaces(references: Iterable[Reference]) -> set[str]:
    """The namespaces that references create operators in, without those of PyTorch and its libraries."""
    return {reference.namespace for reference in references if reference.creates} - _FOREIGN


@dataclass(frozen=True)
class Definition:
    """An operator that a method of a ``Library`` defines, with the line of the call; ``None`` for what is not known."""

    line: int
    namespace: str | None
    op: str | None


@dataclass(frozen=True)
class Problem:
    """A place that cannot be dealt with: its line, what is wrong with it and how to mend it."""

    line: int
    message: str
    fix: str
    severity: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class Wrapped:
    """The use of a function's parameter as a name that PyTorch takes."""

    # An unqualified name is one that a `Library` takes, with a namespace or without.
    kind: Literal["operator", "namespace", "unqualified"]
    creates: bool
    strict: bool = True
    exclusive: bool = False
    unnamed: bool = False
    # The parameter that is the kind of a `Library`.
    mode: str = ""


@dataclass
class Wrapper:
    """A function that hands parameters on as names of operators; ``uses`` holds file and line of each."""

    function: ast.FunctionDef
    uses: dict[tuple[str, Wrapped], tuple[str, int]]


@dataclass
class OpReferences:
    """References to operators in the files of a package, by their paths in the kernel.

    ``leaked_ops`` are lines where ``torch.ops`` itself is handed on, ``wrappers`` the package's functions that hand
    names on to PyTorch, and ``called`` those of them that it calls. ``registrars`` are names of functions that hand
    a parameter to a method of what may be a ``Library``.
    """

    references: dict[str, set[Reference]] = field(default_factory=dict)
    leaked_ops: dict[str, list[int]] = field(default_factory=dict)
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    # Offsets of namespaces that stand elsewhere than where an operator is named, such as in what a variable holds.
    variables: dict[str, set[int]] = field(default_factory=dict)
    # Expressions that are known to name an operator, and parameters whose value is a namespace or an operator's name.
    named: set[int] = field(default_factory=set)
    parameters: dict[int, Literal["operator", "namespace"]] = field(default_factory=dict)
    wrappers: dict[str, Wrapper] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    registrars: set[str] = field(default_factory=set)

    @property
    def parameter_names(self) -> set[str]:
        """Names of the parameters in ``parameters``."""
        functions = (wrapper.function.args for wrapper in self.wrappers.values())
        arguments = (
            parameter
            for function in functions
            for parameter in (*function.posonlyargs, *function.args, *function.kwonlyargs)
        )
        return {argument.arg for argument in arguments if id(argument) in self.parameters}

    def problem(self, path: str, problem: Problem) -> None:
        """Add what cannot be dealt with in a file."""
        self.problems.setdefault(path, []).append(problem)

    def starts(self, path: str) -> set[int]:
        """Offsets of the namespaces in a file that are known."""
        return {reference.start for reference in self.references.get(path, ())}
