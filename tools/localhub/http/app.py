"""The Hub as an ASGI application."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

from dulwich.errors import NotGitRepository
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import HubError, StorageError
from ..names import printable
from ..store import Store
from ..tokens import Tokens
from . import (
    accounts,
    card_metadata,
    commits,
    git,
    lfs,
    openapi,
    pages,
    pull_requests,
    refs,
    repos,
    resolve,
    trees,
)
from .context import Hub, repository_gone
from .csrf import takes_challenge
from .messages import AsciiJSONResponse, problem_response
from .middleware import EncodedPaths, OneLength, RequestIds, request_id
from .problems import Problem, as_problem


def create_app(
    root: Path,
    *,
    trust: Iterable[str] = (),
    open_writes: bool = False,
    host: str | None = None,
    loopback: bool = False,
) -> Starlette:
    """Build the application that serves the Hub at ``root``.

    Args:
        root: The Hub's directory; the caller makes sure that no other Hub uses it.
        trust: Organizations that are trusted kernel publishers.
        open_writes: Accept writes without a token as long as none was created; only for a server that
            nobody but its own machine can reach.
        host: The name or address that the server was told to listen on, if it is no loopback address.
        loopback: True if the server listens on a loopback address.

    Raises:
        HubError: The directory cannot be used.
    """
    modules = (
        openapi,
        accounts,
        card_metadata,
        repos,
        refs,
        trees,
        pull_requests,
        lfs,
        commits,
        resolve,
        git,
        # The last, because a model's page can have almost any address.
        pages,
    )
    app = Starlette(
        routes=[
            Route("/healthz", _health),
            *(route for module in modules for route in module.routes),
            *repos.routes_without_namespace,
        ],
        middleware=[Middleware(RequestIds), Middleware(OneLength), Middleware(EncodedPaths)],
        exception_handlers={
            Problem: _on_problem,
            StorageError: _on_problem,
            HTTPException: _on_unknown,
            NotGitRepository: _on_deleted,
            HubError: _on_unusable,
            ClientDisconnect: _on_disconnect,
            OSError: _on_disk,
            Exception: _on_crash,
        },
    )
    app.router.redirect_slashes = False
    app.state.hub = Hub(Store(root), Tokens(root), frozenset(trust), open_writes, host, loopback)
    return app


def _health(request: Request) -> Response:
    return AsciiJSONResponse({"status": "ok"})


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem | StorageError)
    problem = as_problem(error)
    response = problem_response(problem)
    if problem.status == 401 and problem.code == "RepoNotFound" and takes_challenge(request):
        # Makes git ask for a user name and password; the token goes in as the password.
        response.headers["WWW-Authenticate"] = 'Basic realm="kernelpress Hub"'
    return response


async def _on_unknown(request: Request, error: Exception) -> Response:
    # The router's "no such path" (404) and "not with this method" (405).
    assert isinstance(error, HTTPException)
    route = printable(f"{request.method} {request.scope['path']}")
    message = f"the embedded Hub does not implement {route}"
    return problem_response(Problem(error.status_code, message, headers=dict(error.headers or {})))


async def _on_deleted(request: Request, error: Exception) -> Response:
    # The repository went away while the request was reading it.
    return repository_gone(request)


async def _on_unusable(request: Request, error: Exception) -> Response:
    # The token file was damaged while the Hub runs. Refusing is the safe answer: nobody can tell who is
    # allowed in.
    return problem_response(Problem(503, str(error)))


async def _on_crash(request: Request, error: Exception) -> Response:
    # Starlette logs the traceback; the caller gets no part of it.
    response = problem_response(Problem(500, "the embedded Hub failed; its log says more"))
    # This answer goes past all middleware.
    response.headers["X-Request-Id"] = request_id(request.headers)
    return response


async def _on_disk(request: Request, error: Exception) -> Response:
    # Unfinished files are still aside, and go with the request.
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return problem_response(Problem(507, "the Hub's disk is full; nothing of this request was kept"))
    raise error


async def _on_disconnect(request: Request, error: Exception) -> Response:
    # Nobody is left to read this; it only keeps the log free of a traceback.
    return Response(status_code=400)
