"""What every request handler needs: who is calling, which repository is meant, what may be done."""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import IO
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .paths import KINDS, RepoId, printable, repo_id
from .problems import Problem, bad_request, too_large
from .repository import DEFAULT_BRANCH, Repository
from .store import Settings, Store
from .tokens import Token, Tokens

MAX_JSON_BYTES = 8 << 20
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Args:
        token: The token it came with, or None.
    """

    token: Token | None

    @property
    def name(self) -> str:
        """Name to put into commits."""
        return "anonymous" if self.token is None else self.token.name

    def belongs(self, namespace: str) -> bool:
        """Whether the caller's token is for this namespace."""
        return self.token is not None and self.token.covers(namespace)


@dataclass(frozen=True)
class Target:
    """The repository that a request is about."""

    id: RepoId
    git: Repository
    settings: Settings
    caller: Caller


@dataclass(frozen=True)
class Hub:
    """A Hub's state and rules.

    Args:
        store: Its repositories.
        tokens: Its tokens.
        trust: Organizations shown as trusted kernel publishers.
        open_writes: Whether writes need no token as long as none was created (a developer's own Hub).
        secret: Signs addresses that carry their own permission; another one after every start.
    """

    store: Store
    tokens: Tokens
    trust: frozenset[str]
    open_writes: bool
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def caller(self, request: Request) -> Caller:
        """Identify who calls.

        Raises:
            Problem: 401 when credentials are sent that this Hub does not know.
        """
        header = request.headers.get("authorization")
        if header is None:
            return Caller(None)
        secret = _secret(header)
        token = None if secret is None else self.tokens.find(secret)
        if token is None:
            raise Problem(401, "Invalid credentials in Authorization header")
        return Caller(token)

    def require_write(self, caller: Caller, namespace: str) -> None:
        """Let only those pass who may change things in a namespace.

        Raises:
            Problem: 401 without a token where one is needed, 403 when it only allows reading.
        """
        if caller.token is None:
            if self.open_writes and not self.tokens.any_exist():
                return
            raise Problem(
                401,
                "this Hub takes writes only with a token: create one with 'kernelpress token create NAME' "
                "on the Hub's machine and set HF_TOKEN to it",
            )
        if caller.token.scope != "write":
            raise Problem(
                403, f"the token of {caller.name!r} only allows reading; use one with scope 'write'"
            )
        if not caller.token.covers(namespace):
            raise Problem(403, f"the token of {caller.name!r} is for other organizations than {namespace!r}")

    def readable(self, request: Request, *, content: bool = False) -> Target:
        """The repository named by the request's path, if its caller may read it.

        Loaders before 0.14 ask for kernels as if they were models, so a kernel answers for a model that does
        not exist.

        Args:
            request: The request.
            content: Whether it is for files' content, which a gated repository keeps from strangers.

        Raises:
            Problem: ``RepoNotFound`` when it does not exist or is private to others; the two are not told
                apart. ``GatedRepo`` for content that the caller may not have.
        """
        caller, repo = self.caller(request), named_repo(request)
        target = self._visible_target(repo, caller)
        if target is None and repo.kind == "model":
            target = self._visible_target(RepoId("kernel", repo.namespace, repo.name), caller)
        if target is None:
            raise self.repo_not_found(repo, caller)
        if content:
            self._require_admission(target)
        return target

    def writable(self, request: Request) -> Target:
        """Like ``readable``, for a caller who may also write.

        Raises:
            Problem: As ``readable`` and ``require_write``.
        """
        caller, repo = self.caller(request), named_repo(request)
        target = self._visible_target(repo, caller)
        if target is None:
            raise self.repo_not_found(repo, caller)
        self.require_write(caller, repo.namespace)
        return target

    def trusted_target(self, repo: RepoId) -> Target:
        """A repository for a request that has shown its permission otherwise.

        Raises:
            Problem: ``RepoNotFound``.
        """
        git = self.store.get(repo)
        if git is None:
            raise self.repo_not_found(repo, Caller(None))
        return Target(repo, git, self.store.settings(repo), Caller(None))

    def _visible_target(self, repo: RepoId, caller: Caller) -> Target | None:
        git = self.store.get(repo)
        try:
            settings = None if git is None else self.store.settings(repo)
        except FileNotFoundError:
            settings = None
        if git is None or settings is None or (settings.private and not caller.belongs(repo.namespace)):
            return None
        return Target(repo, git, settings, caller)

    def _require_admission(self, target: Target) -> None:
        gated, caller = target.settings.gated, target.caller
        if gated is None or caller.belongs(target.id.namespace) or (gated == "auto" and caller.token):
            return
        raise Problem(
            401 if caller.token is None else 403,
            f"access to {target.id} is restricted: use a token"
            + (f" of {target.id.namespace}" if gated == "manual" else ""),
            code="GatedRepo",
        )

    def repo_not_found(self, repo: RepoId, caller: Caller) -> Problem:
        """The answer for a repository that is not there, or not for this caller."""
        if caller.token is None and self.tokens.any_exist():
            return Problem(
                401,
                f"{repo.kind} repository {repo} does not exist, or needs a token to be seen",
                code="RepoNotFound",
                # Makes git ask for a user name and password; the token goes in as the password.
                headers={"WWW-Authenticate": 'Basic realm="kernelpress Hub"'},
            )
        return Problem(404, f"{repo.kind} repository {repo} not found", code="RepoNotFound")

    def visible(self, repo: RepoId, caller: Caller) -> bool:
        """Whether an existing repository may be listed to the caller."""
        try:
            return caller.belongs(repo.namespace) or not self.store.settings(repo).private
        except FileNotFoundError:
            return False


class AsciiJSONResponse(JSONResponse):
    """JSON that stays valid for text that is no valid Unicode (a file name pushed from elsewhere)."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def hub_of(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


def named_repo(request: Request) -> RepoId:
    """The repository that the request's path names, whether it exists or not.

    Raises:
        Problem: 400 for an invalid name, 404 for a type that this Hub does not serve.
    """
    kind = KINDS.get(request.path_params.get("kind", "models"))
    if kind is None:
        raise Problem(404, "the embedded Hub serves kernel and model repositories only", code="RepoNotFound")
    return repo_id(kind, segment(request, "namespace"), segment(request, "name"))


def segment(request: Request, name: str) -> str:
    """A path parameter, decoded.

    Raises:
        Problem: 400 when it is not UTF-8.
    """
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


async def json_object(request: Request) -> dict[str, object]:
    """The request's body as a JSON object; an empty body is an empty object.

    Raises:
        Problem: 400 when it is something else, 413 when it is too large.
    """
    body = b"".join([chunk async for chunk in body_chunks(request, MAX_JSON_BYTES)])
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise bad_request("the request's body is not valid JSON") from None
    if not isinstance(value, dict):
        raise bad_request("the request's body must be a JSON object")
    return value


async def spooled_body(request: Request, limit: int) -> IO[bytes]:
    """The request's body in a temporary file (in memory while small), rewound; the caller closes it."""
    file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115
    try:
        async for chunk in body_chunks(request, limit):
            file.write(chunk)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def string(body: Mapping[str, object], key: str, default: str | None = None) -> str:
    """A string member of a JSON body.

    Raises:
        Problem: 400 when it is missing without a default, or no string.
    """
    value = body.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise bad_request(f'"{key}" must be a string')
    return value


def revision_of(request: Request) -> str:
    """The revision in the request's path, ``main`` by default."""
    return segment(request, "ref") if "ref" in request.path_params else DEFAULT_BRANCH


def flag(request: Request, name: str) -> bool:
    """Whether a query parameter says yes."""
    return request.query_params.get(name, "").lower() in ("1", "true")


def number(request: Request, name: str, default: int, *, lowest: int) -> int:
    """A query parameter as a whole number.

    Raises:
        Problem: 400 when it is none, or below ``lowest``.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= lowest):
        raise bad_request(f"{name!r} must be a whole number of at least {lowest}")
    return int(text)


def problem_response(problem: Problem) -> Response:
    """A problem as the Hub answers it: JSON for people and scripts, headers for the client."""
    # A header holds Latin-1 only, and no line breaks.
    message = printable(problem.message.replace("\n", " ")).encode("ascii", "replace").decode("ascii")
    headers = {"X-Error-Message": message, **problem.headers}
    if problem.code is not None:
        headers["X-Error-Code"] = problem.code
    return AsciiJSONResponse({"error": problem.message, **problem.extra}, problem.status, headers)


def repository_gone(request: Request) -> Response:
    """The answer when a repository was deleted while a request was reading it."""
    return problem_response(hub_of(request).repo_not_found(named_repo(request), Caller(None)))


def _secret(header: str) -> str | None:
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        # git sends a password, never a bearer token.
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, ValueError):
            return None
    return None
