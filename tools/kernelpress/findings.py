"""What examining sources or a build turns up, and the error that a build raises for all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kernelpress.errors import SourceError

# A note says what was not looked at, or may be nothing.
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
    """The sources cannot be built; ``findings`` are all the reasons, the first of them is the error's own."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        first = self.findings[0]
        super().__init__(f"{first.code} {first.message}; {first.fix}", path=first.path, line=first.line)

    def __str__(self) -> str:
        return "\n".join(f"{'error: ' * (number > 0)}{each}" for number, each in enumerate(self.findings))
