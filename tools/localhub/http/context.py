"""The state that every request handler works with: the caller, the repository, and what the caller may do."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from dulwich.errors import NotGitRepository
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from ..errors import RevisionNotFound
from ..git.reader import CommitInfo
from ..git.repository import DEFAULT_BRANCH, Repository
from ..names import KINDS, RepoId, RepoKind, repo_id
from ..store import Settings, Store
from ..tokens import Token, Tokens
from .csrf import cross_site_reason, names_another_host
from .messages import problem_response, segment
from .problems import Problem


class _KindConvertor(StringConvertor):
    """The types of repositories as addresses name them, so that no model's address is taken for another's."""

    regex = "kernels|models|datasets|spaces"


register_url_convertor("kind", _KindConvertor())

# Where a repository is in the API; for people and for git it is below "/kernels" or, a model, at the top.
API_REPO = "/api/{kind}/{namespace}/{name}"
WEB_REPOS = ("/{kind:kind}/{namespace}/{name}", "/{namespace}/{name}")


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Args:
        token: The token it came with, or None.
        bearer: True if the token came as such, False if as a password, which a browser sends by itself.
    """

    token: Token | None
    bearer: bool = False

    @property
    def name(self) -> str:
        """Name to put into commits."""
        return "anonymous" if self.token is None else self.token.name

    def belongs(self, namespace: str) -> bool:
        """True if the caller's token is for this namespace."""
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
        open_writes: Take writes without a token as long as none was created (a developer's own Hub).
        host: The name or address that it was told to listen on, if known; loopback addresses need not be.
        loopback: True if it listens on a loopback address.
        secret: Signs addresses that carry their own permission; another one after every start.
    """

    store: Store
    tokens: Tokens
    trust: frozenset[str]
    open_writes: bool
    host: str | None = None
    loopback: bool = False
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def caller(self, request: Request) -> Caller:
        """Identify who calls.

        Raises:
            Problem: 401 when credentials are sent that this Hub does not know; 403 for a page whose own name was made
                to lead to this machine.
        """
        header = request.headers.get("authorization")
        scheme, secret = ("", None) if header is None else _credentials(header)
        token = None if secret is None else self.tokens.find(secret)
        if header is not None and token is None:
            raise Problem(401, "Invalid credentials in Authorization header")
        bearer = scheme == "bearer"
        if self.loopback and not bearer and names_another_host(request, self.host):
            raise Problem(
                403,
                "this Hub is for its own machine and answers no other sites' pages: the Host header names another "
                "machine; open it as localhost, or send a token",
            )
        return Caller(token, bearer)

    def require_write(self, request: Request, caller: Caller, namespace: str | None) -> None:
        """Let only those pass who may change things in a namespace, or in any if it is not known yet.

        Raises:
            Problem: 401 without a token where one is needed; 403 when it only allows reading or came as a password,
                or when there is none and the request comes from a page of another site.
        """
        token = caller.token
        if token is None:
            if not self.open_writes or self.tokens.any_exist():
                raise Problem(
                    401,
                    "this Hub takes writes only with a token: create one with "
                    "'kernelpress token create NAME --root ROOT' on the Hub's machine and set HF_TOKEN to it",
                )
            reason = cross_site_reason(request, self.host)
            if reason is not None:
                raise Problem(
                    403, f"this Hub takes no writes of other sites' pages without a token: {reason}"
                )
        elif not caller.bearer:
            raise Problem(
                403,
                "this Hub takes writes with 'Authorization: Bearer TOKEN' only: "
                "a password is sent by browsers also for other sites' pages",
            )
        elif token.scope != "write":
            raise Problem(403, f"the token of {token.name!r} only allows reading; use one with scope 'write'")
        elif namespace is not None and not token.covers(namespace):
            raise Problem(403, f"the token of {token.name!r} is for other organizations than {namespace!r}")

    def readable(self, request: Request, *, content: bool = False) -> Target:
        """The repository named by the request's path, if its caller may read it.

        Loaders before 0.14 ask for kernels as if they were models, so a kernel answers for a model that does
        not exist.

        Args:
            request: The request.
            content: True if it is for files' content, which a gated repository keeps from strangers.

        Raises:
            Problem: ``RepoNotFound`` when it does not exist or is private to others; the two are not told
                apart. ``GatedRepo`` for content that the caller may not have.
        """
        caller, repo = self.caller(request), named_repo(request)
        target = self.visible_target(repo, caller)
        if target is None and repo.kind == "model":
            target = self.visible_target(RepoId("kernel", repo.namespace, repo.name), caller)
        if target is None:
            raise self.missing(request, repo, caller)
        if content:
            require_admission(target)
        return target

    def writable(self, request: Request) -> Target:
        """Like ``readable``, for a caller who may also write.

        Raises:
            Problem: As ``readable`` and ``require_write``.
        """
        caller, repo = self.caller(request), named_repo(request)
        target = self.visible_target(repo, caller)
        if target is None:
            raise self.missing(request, repo, caller)
        self.require_write(request, caller, repo.namespace)
        return target

    def visible_target(self, repo: RepoId, caller: Caller) -> Target | None:
        """A repository, or None if it does not exist or is private to others than the caller."""
        git = self.store.get(repo)
        try:
            settings = None if git is None else self.store.settings(repo)
        except FileNotFoundError:
            settings = None
        if git is None or settings is None or (settings.private and not caller.belongs(repo.namespace)):
            return None
        return Target(repo, git, settings, caller)

    def visible(self, repo: RepoId, caller: Caller) -> bool:
        """True if an existing repository may be listed to the caller."""
        try:
            return caller.belongs(repo.namespace) or not self.store.settings(repo).private
        except FileNotFoundError:
            return False

    def listed(
        self, caller: Caller, search: str, author: str | None = None, kind: RepoKind | None = None
    ) -> Iterator[tuple[Target, CommitInfo]]:
        """Repositories that the caller may see and a search finds, each with the newest commit of its ``main``."""
        for repo in self.store.repositories(kind):
            if search.lower() not in str(repo).lower() or author not in (None, repo.namespace):
                continue
            # One that goes away in this moment is not listed.
            with suppress(NotGitRepository, RevisionNotFound):
                target = self.visible_target(repo, caller)
                if target is not None:
                    yield target, target.git.commit_info(target.git.resolve(DEFAULT_BRANCH))

    def missing(self, request: Request, repo: RepoId, caller: Caller) -> Problem:
        """The answer for a repository that is not where the request's path says: its new place, or ``RepoNotFound``."""
        moved = self.store.moved(repo)
        if moved is None or self.visible_target(moved, caller) is None:
            return self.repo_not_found(caller)
        # Relative, because the client follows no other redirect of a file; the same method and body are sent again.
        return Problem(
            307, f"{repo} is {moved} now", headers={"Location": _under_its_new_name(request, moved)}
        )

    def repo_not_found(self, caller: Caller) -> Problem:
        """The answer for a repository that is not there, or not for this caller: the client says what to do."""
        status = 401 if caller.token is None and self.tokens.any_exist() else 404
        return Problem(status, "Repository not found", code="RepoNotFound")


def hub_of(request: Request) -> Hub:
    """The Hub that a request was sent to."""
    hub: Hub = request.app.state.hub
    return hub


def require_readable(request: Request) -> None:
    """Let only those pass who may see the repository that the request's path names.

    Raises:
        Problem: As ``Hub.readable``.
    """
    hub_of(request).readable(request)


def require_writable(request: Request) -> None:
    """Let only those pass who may change the repository that the request's path names.

    Raises:
        Problem: As ``Hub.writable``.
    """
    hub_of(request).writable(request)


def require_writer(request: Request) -> None:
    """Let only those pass who may change something; which repository it is, the body says.

    Raises:
        Problem: As ``Hub.caller`` and ``Hub.require_write``.
    """
    hub = hub_of(request)
    hub.require_write(request, hub.caller(request), None)


def named_repo(request: Request) -> RepoId:
    """The id of the repository that the request's path names, existing or not.

    Raises:
        Problem: 404 for a type that this Hub does not serve.
        InvalidInput: It is no valid name.
    """
    kind = KINDS.get(request.path_params.get("kind", "models"))
    if kind is None:
        raise Problem(404, "the embedded Hub serves kernel and model repositories only", code="RepoNotFound")
    namespace, name = segment(request, "namespace"), segment(request, "name")
    if namespace in KINDS:
        # The address of a kernel or model without a namespace, of which there are none.
        raise hub_of(request).repo_not_found(Caller(None))
    return repo_id(kind, namespace, name)


def revision_of(request: Request) -> str:
    """The revision in the request's path, ``main`` by default."""
    return segment(request, "ref", DEFAULT_BRANCH)


def repository_gone(request: Request) -> Response:
    """The answer when a repository was deleted or moved while a request was reading it."""
    return problem_response(hub_of(request).missing(request, named_repo(request), Caller(None)))


def require_admission(target: Target) -> None:
    """Let only those pass who may have the content of a gated repository.

    Raises:
        Problem: ``GatedRepo``.
    """
    gated, caller = target.settings.gated, target.caller
    if gated is None or caller.belongs(target.id.namespace) or (gated == "auto" and caller.token):
        return
    raise Problem(
        401 if caller.token is None else 403,
        f"access to {target.id} is restricted: use a token"
        + (f" of {target.id.namespace}" if gated == "manual" else ""),
        code="GatedRepo",
    )


def _under_its_new_name(request: Request, repo: RepoId) -> str:
    """The address of a request with another repository in it."""
    parts = str(request.scope["path"]).split("/")
    # What comes before is `api` and a kind, neither of which a namespace can be called.
    at = parts.index(request.path_params["namespace"])
    parts[at] = repo.namespace
    parts[at + 1] = repo.name + ".git" * parts[at + 1].endswith(".git")
    query = request.url.query
    return "/".join(parts) + f"?{query}" * bool(query)


def _credentials(header: str) -> tuple[str, str | None]:
    """Scheme and secret of an Authorization header: the bearer token, or the password that git sends in its place."""
    scheme, _, value = header.partition(" ")
    scheme = scheme.lower()
    if scheme == "bearer":
        return scheme, value.strip()
    if scheme == "basic":
        with suppress(ValueError):
            return scheme, base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
    return scheme, None
