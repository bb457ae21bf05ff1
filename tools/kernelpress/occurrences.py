"""What is found of operators in one file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["operator", "namespace", "name"]


@dataclass(frozen=True)
class Site:
    """A namespace as it stands in the source, at a range of bytes."""

    start: int
    end: int
    namespace: str
    op: str | None = None
    creates: bool = False


@dataclass(frozen=True)
class Problem:
    """A place that cannot be dealt with: its line, what is wrong with it and how to mend it."""

    line: int
    message: str
    fix: str


@dataclass(frozen=True)
class Mention:
    """A line that names an operator of a namespace and is left as it is."""

    line: int
    namespace: str


@dataclass(frozen=True)
class Wanted:
    """A name that another module of the package binds, where an operator or its name, a namespace, or a name with or
    without one (``"name"``) is called for.

    ``name`` is as an import has it: relative ones with their dots.
    """

    name: str
    line: int
    kind: Kind
    creates: bool


@dataclass(frozen=True)
class Sites:
    """What one file holds of operators. ``escapes`` are lines where ``torch.ops`` itself is handed on, and ``wanted``
    is what other files must be asked for."""

    sites: tuple[Site, ...] = ()
    escapes: tuple[int, ...] = ()
    problems: tuple[Problem, ...] = ()
    wanted: tuple[Wanted, ...] = ()
