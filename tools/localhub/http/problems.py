"""Errors with an HTTP status, which become the Hub's answers.

The client chooses its exception by the ``X-Error-Code`` header and shows ``X-Error-Message``, so both are
part of the protocol.
"""

from __future__ import annotations

from ..errors import (
    Conflict,
    Damaged,
    EntryNotFound,
    InvalidInput,
    RevisionNotFound,
    StaleParent,
    StorageError,
)


class Problem(Exception):
    """An answer other than success.

    Args:
        status: HTTP status, 4xx unless the Hub itself is broken.
        message: The cause and how to mend it.
        code: The Hub's error code (``RepoNotFound``, ``RevisionNotFound``, ``EntryNotFound``), if it has one.
        headers: Further response headers.
        extra: Further members of the JSON body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        extra: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}
        self.extra = extra or {}


def bad_request(message: str) -> Problem:
    return Problem(400, message)


def too_large(message: str) -> Problem:
    return Problem(413, message)


def conflict(message: str, **extra: object) -> Problem:
    return Problem(409, message, extra=extra)


def entry_not_found(message: str) -> Problem:
    return Problem(404, message, code="EntryNotFound")


_ANSWERS: dict[type[StorageError], tuple[int, str | None]] = {
    InvalidInput: (400, None),
    RevisionNotFound: (404, "RevisionNotFound"),
    EntryNotFound: (404, "EntryNotFound"),
    Damaged: (404, "EntryNotFound"),
    Conflict: (409, None),
    StaleParent: (412, None),
}


def as_problem(error: Problem | StorageError) -> Problem:
    """The answer that an error of the storage becomes."""
    if isinstance(error, Problem):
        return error
    status, code = _ANSWERS[type(error)]
    return Problem(status, str(error), code=code)
