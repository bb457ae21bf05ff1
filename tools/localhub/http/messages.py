"""Parts of requests, and the Hub's answers."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime, timezone
from functools import wraps
from typing import IO
from urllib.parse import quote, unquote, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..names import printable
from .problems import Problem, bad_request, too_large

MAX_JSON_BYTES = 8 << 20
# For bodies that anybody may send.
MAX_QUESTION_BYTES = 1 << 20
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")

Body = Mapping[str, object]


class AsciiJSONResponse(JSONResponse):
    """JSON that stays valid for text that is no valid Unicode (a file name pushed from elsewhere)."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def segment(request: Request, name: str, default: str | None = None) -> str:
    """A path parameter, decoded; ``default`` for one that this route does not have.

    Raises:
        Problem: 400 when it is not UTF-8.
    """
    if default is not None and name not in request.path_params:
        return default
    return decoded(request.path_params[name])


def decoded(text: str) -> str:
    """Undo percent-encoding.

    Raises:
        Problem: 400 when the result is not UTF-8.
    """
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise bad_request("the address is not valid UTF-8") from None


def endpoint(request: Request) -> str:
    """The Hub's address as the caller wrote it, without a trailing slash."""
    host = request.headers.get("host", "")
    if _HOST.fullmatch(host) is None:
        address = request.scope.get("server") or ("localhost", None)
        host = f"{address[0]}:{address[1]}"
    return f"{request.scope['scheme']}://{host}"


def next_page(request: Request, **parameters: int) -> dict[str, str]:
    """The header that leads a client to the next page, which these query parameters name."""
    kept = [(key, value) for key, value in request.query_params.multi_items() if key not in parameters]
    query = urlencode([*kept, *((key, str(value)) for key, value in parameters.items())])
    path = quote(request.scope["path"], safe="/%:@")
    return {"Link": f'<{endpoint(request)}{path}?{query}>; rel="next"'}


def iso_time(seconds: int) -> str:
    """A point in time as the API writes it."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


async def body_chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The request's body piece by piece.

    Raises:
        Problem: 413 as soon as it is longer than ``limit`` bytes.
    """
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise too_large(f"the request is larger than the {limit >> 20} MiB this Hub takes")
        yield chunk


async def whole_body(request: Request, limit: int = MAX_JSON_BYTES) -> bytes:
    """The request's body in memory.

    Raises:
        Problem: As ``body_chunks``.
    """
    return b"".join([chunk async for chunk in body_chunks(request, limit)])


async def spooled_body(request: Request, limit: int) -> IO[bytes]:
    """The request's body in a temporary file (in memory while small), rewound; the caller closes it.

    Raises:
        Problem: As ``body_chunks``.
    """
    file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115
    try:
        async for chunk in body_chunks(request, limit):
            file.write(chunk)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def with_json(
    permit: Callable[[Request], object], limit: int = MAX_JSON_BYTES
) -> Callable[[Callable[[Request, Body], Response]], Callable[[Request], Awaitable[Response]]]:
    """Make a route's endpoint of a blocking handler that takes the request and its body, a JSON object.

    An empty body is an empty object. A body that is something else is answered by 400, one that is too large by 413.

    Args:
        permit: Raises a problem for a caller who may not do this; nothing is read before.
        limit: Bytes that a body may have.
    """

    def decorate(handler: Callable[[Request, Body], Response]) -> Callable[[Request], Awaitable[Response]]:
        @wraps(handler)
        async def endpoint_with_body(request: Request) -> Response:
            await run_in_threadpool(permit, request)
            body = await whole_body(request, limit)
            return await run_in_threadpool(handler, request, _json_object(body))

        return endpoint_with_body

    return decorate


def _json_object(text: bytes) -> Body:
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise bad_request("the request's body is not valid JSON") from None
    if not isinstance(value, dict):
        raise bad_request("the request's body must be a JSON object")
    return value


def string(body: Body, key: str, default: str | None = None) -> str:
    """A string member of a JSON object.

    Raises:
        Problem: 400 when it is missing without a default, or no string.
    """
    value = body.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise bad_request(f'"{key}" must be a string')
    return value


def check_parameters(request: Request, *names: str) -> None:
    """Refuse a query parameter that is none of ``names``: an answer that ignores what was asked is a wrong one.

    Raises:
        Problem: 400.
    """
    unknown = sorted(set(request.query_params) - set(names))
    if unknown:
        raise bad_request(
            f"the embedded Hub does not implement these parameters: {printable(', '.join(unknown))}"
        )


def choice(request: Request, name: str, *values: str) -> str | None:
    """A query parameter that is one of ``values``, or None.

    Raises:
        Problem: 400 for another value.
    """
    value = request.query_params.get(name)
    if value is not None and value not in values:
        raise bad_request(f"{name!r} must be one of {', '.join(values)}")
    return value


def flag(request: Request, name: str) -> bool:
    """True if a query parameter says yes."""
    return is_yes(request.query_params.get(name, ""))


def is_yes(text: str) -> bool:
    """True for the ways in which clients write a true value into a query or a form."""
    return text.lower() in ("1", "true")


def number(request: Request, name: str, default: int, *, lowest: int) -> int:
    """A query parameter as a whole number.

    Raises:
        Problem: 400 when it is none, or below ``lowest``.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    value = whole_number(text)
    if value is None or value < lowest:
        raise bad_request(f"{name!r} must be a whole number of at least {lowest}")
    return value


def whole_number(text: str) -> int | None:
    """The value of up to nine ASCII digits, or None for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None


def problem_response(problem: Problem) -> Response:
    """A problem as the Hub answers it: JSON for people and scripts, headers for the client."""
    # A header holds Latin-1 only, no line breaks, and no blanks at its ends.
    message = printable(problem.message.replace("\n", " ")).encode("ascii", "replace").decode("ascii")
    headers = {"X-Error-Message": message.strip(), **problem.headers}
    if problem.code is not None:
        headers["X-Error-Code"] = problem.code
    return AsciiJSONResponse({"error": problem.message, **problem.extra}, problem.status, headers)
