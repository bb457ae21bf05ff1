"""Every error that kernelpress reports to its user, in one hierarchy.

A message says what is wrong, where (file and line when there is one) and how to mend it. The command
line prints it without a traceback and exits with the class's ``exit_code``.
"""

from __future__ import annotations

from pathlib import Path


class KernelpressError(Exception):
    """Base of all errors with a cause that the user can mend.

    Args:
        message: What is wrong and how to mend it, in one or two sentences.
        path: The file or directory the message is about, if any.
        line: 1-based line in ``path``, if known.
    """

    exit_code = 1

    def __init__(self, message: str, *, path: Path | str | None = None, line: int | None = None) -> None:
        self.message = message
        self.path = None if path is None else Path(path)
        self.line = line
        super().__init__(str(self))

    def __str__(self) -> str:
        if self.path is None:
            return self.message
        where = str(self.path) if self.line is None else f"{self.path}:{self.line}"
        return f"{where}: {self.message}"


class SpecError(KernelpressError):
    """``build.toml`` is missing, malformed or asks for something impossible."""


class SourceError(KernelpressError):
    """The kernel's sources are missing or cannot be shipped as they are."""


class BuildError(KernelpressError):
    """The build cannot be written, or an existing one cannot be read."""


class CheckError(KernelpressError):
    """A built variant does not hold what the Kernel Hub demands of it."""


class PublishError(KernelpressError):
    """The Hub refused, or could not be reached; nothing was published unless the message says so."""


class HubError(KernelpressError):
    """The embedded Hub cannot start or cannot use its root directory."""
