"""Steps before every request's route and after every answer."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .messages import problem_response
from .problems import bad_request

_IDENTIFIER = re.compile(r"[\x21-\x7e]{1,200}")


class EncodedPaths:
    """Route on the path as it was sent: a revision or folder may hold an encoded slash.

    Servers decode the path before routing, and after that ``feature%2Fx/file`` cannot be told from
    ``feature/x/file``. Handlers decode each segment themselves.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("latin-1")}
        await self._app(scope, receive, send)


class OneLength:
    """Refuse a request that gives its length twice: a proxy may believe the other one (RFC 9112, 6.1)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and {"content-length", "transfer-encoding"} <= set(Headers(scope=scope)):
            refusal = problem_response(
                bad_request("a request has Content-Length or Transfer-Encoding, not both")
            )
            # Where the next request would begin, nobody can say.
            refusal.headers["Connection"] = "close"
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class RequestIds:
    """Name each request in its answer, as the client's error messages do."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id(Headers(scope=scope))
            await send(message)

        await self._app(scope, receive, send_with_id if scope["type"] == "http" else send)


def request_id(headers: Headers) -> str:
    """The id that a request came with, or a new one."""
    sent: Iterable[str | None] = (headers.get("x-request-id"), headers.get("x-amzn-trace-id"))
    return next((name for name in sent if name and _IDENTIFIER.fullmatch(name)), None) or secrets.token_hex(
        16
    )
