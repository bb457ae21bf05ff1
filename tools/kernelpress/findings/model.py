"""Findings: places in sources or in a build that break a rule, and the error of a build that they forbid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kernelpress.errors import SourceError

# A note is about something that could not be examined, or may be nothing.
Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something that does not hold: which rule says so, where, and how to mend it. ``line`` counts from 1."""

    code: str
    severity: Severity
    path: Path
    line: int | None
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.code} {self.message}; {self.fix}"

    @property
    def where(self) -> str:
        """The file, and the line where there is one."""
        return str(self.path) if self.line is None else f"{self.path}:{self.line}"


class FindingsError(SourceError):
    """Sources that cannot be built.

    Args:
        blocking: The findings that forbid the build; the message says all of them.
        findings: Every finding in the sources, these among them.
    """

    def __init__(self, blocking: Sequence[Finding], findings: Sequence[Finding]) -> None:
        self.blocking = tuple(blocking)
        self.findings = tuple(findings)
        first = self.blocking[0]
        super().__init__(f"{first.code} {first.message}; {first.fix}", path=first.path, line=first.line)

    def __str__(self) -> str:
        return "\n".join(
            f"{'error: ' * (number > 0)}{finding}" for number, finding in enumerate(self.blocking)
        )
