"""Errors of the Hub that know nothing of HTTP."""

from __future__ import annotations

from pathlib import Path


class HubError(Exception):
    """The Hub cannot start or cannot use its root directory; whoever runs it can mend that.

    Args:
        message: The cause and how to mend it.
        path: The file or directory that the message is about, if any.
    """

    def __init__(self, message: str, *, path: Path | None = None) -> None:
        super().__init__(message if path is None else f"{path}: {message}")


class StorageError(Exception):
    """A change or a question that the stored repositories cannot answer; the message is for whoever asked."""


class InvalidInput(StorageError):
    """A name, a path, content or a change that is not allowed."""


class RevisionNotFound(StorageError):
    """No branch, tag or commit of this name."""

    def __init__(self, revision: str) -> None:
        super().__init__(f"Invalid rev id: {revision}")


class EntryNotFound(StorageError):
    """No file or folder at this path."""


class Damaged(StorageError):
    """An object of a repository is missing, cannot be read or is another than is needed; ``fsck`` says more."""

    def __init__(self, oid: str, reason: str) -> None:
        super().__init__(f"this repository is damaged: object {oid} {reason}")


class Conflict(StorageError):
    """The change clashes with what is stored."""


class StaleParent(StorageError):
    """The branch is not at the commit that the caller insists on."""
