"""What a request can go wrong with, as exceptions that become the Hub's own error answers.

The client chooses its exception by the ``X-Error-Code`` header and shows ``X-Error-Message``, so both are
part of the protocol.
"""

from __future__ import annotations


class Problem(Exception):
    """An answer other than success.

    Args:
        status: HTTP status, 4xx unless the Hub itself is broken.
        message: What is wrong and how to mend it.
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


def revision_not_found(revision: str) -> Problem:
    return Problem(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def entry_not_found(message: str) -> Problem:
    return Problem(404, message, code="EntryNotFound")
