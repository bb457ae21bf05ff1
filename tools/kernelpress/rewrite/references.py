"""References to operators in a file, and places that cannot be followed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
    """An operator that a method of a ``Library`` defines, with the line of the call."""

    line: int
    namespace: str
    op: str


@dataclass(frozen=True)
class Problem:
    """A place that cannot be dealt with: its line, what is wrong with it and how to mend it."""

    line: int
    message: str
    fix: str


@dataclass(frozen=True)
class Mention:
    """A line that names an operator of a namespace and is left as it is.

    ``registers`` is true where a method is called that has the name of one of a ``Library``'s, on what is not known to
    be one.
    """

    line: int
    namespace: str
    registers: bool = False
