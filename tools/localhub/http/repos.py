"""Routes of repositories: creating, moving, listing, describing and deleting them, and their settings."""

from __future__ import annotations

from dataclasses import replace

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import Conflict
from ..git.reader import CommitInfo, PathInfo
from ..names import KINDS, RepoId, RepoKind, printable, repo_id
from .context import API_REPO, Caller, Target, hub_of, require_writable, require_writer, revision_of
from .messages import (
    AsciiJSONResponse,
    Body,
    check_parameters,
    choice,
    endpoint,
    flag,
    is_yes,
    iso_time,
    number,
    string,
    with_json,
)
from .problems import Problem, bad_request, conflict
from .trees import lfs_json

_ORDERS = ("lastModified", "createdAt", "downloads", "likes", "trendingScore")


@with_json(require_writer)
def create_repo(request: Request, body: Body) -> Response:
    hub = hub_of(request)
    caller = hub.caller(request)
    repo = _repo_in_body(body, caller)
    hub.require_write(request, caller, repo.namespace)
    url = f"{endpoint(request)}/{repo.web_path}"
    private = _private_in_body(body)
    if private and not hub.tokens.any_exist():
        raise bad_request(
            "a private repository needs a token, else nobody could read it: create one with "
            "'kernelpress token create NAME --root ROOT' on the Hub's machine and set HF_TOKEN to it"
        )
    try:
        hub.store.create(repo, private=private, author=caller.name)
    except Conflict as error:
        # The client reads the address even from this answer when told that existing is fine.
        raise conflict(str(error), url=url) from error
    return AsciiJSONResponse({"url": url, "name": str(repo), "id": str(repo)})


@with_json(require_writer)
def delete_repo(request: Request, body: Body) -> Response:
    hub = hub_of(request)
    caller = hub.caller(request)
    repo = _repo_in_body(body, caller)
    hub.require_write(request, caller, repo.namespace)
    if not hub.store.delete(repo):
        raise hub.repo_not_found(caller)
    return AsciiJSONResponse({})


@with_json(require_writer)
def move_repo(request: Request, body: Body) -> Response:
    hub = hub_of(request)
    caller = hub.caller(request)
    kind = _kind_in_body(body)
    ids = []
    for key in ("fromRepo", "toRepo"):
        namespace, slash, name = string(body, key).partition("/")
        if not slash:
            raise bad_request(f'"{key}" must be owner/name')
        ids.append(repo_id(kind, namespace, name))
    old, new = ids
    if hub.store.get(old) is None or not hub.visible(old, caller):
        raise hub.repo_not_found(caller)
    for repo in ids:
        hub.require_write(request, caller, repo.namespace)
    if not hub.store.move(old, new):
        raise hub.repo_not_found(caller)
    return AsciiJSONResponse({"url": f"{endpoint(request)}/{new.web_path}"})


def list_repos(request: Request) -> Response:
    hub = hub_of(request)
    caller = hub.caller(request)
    kind = KINDS.get(request.path_params["kind"])
    if kind is None:
        raise Problem(404, "the embedded Hub lists kernels and models only")
    check_parameters(
        request, "search", "author", "gated", "sort", "direction", "limit", "full", "expand", "expand[]"
    )
    query = request.query_params
    limit = number(request, "limit", 1000, lowest=0)
    order, gated = choice(request, "sort", *_ORDERS), choice(request, "gated", "true", "false")
    choice(request, "direction", "-1")
    repos = [
        (target, commit)
        for target, commit in hub.listed(caller, query.get("search", ""), query.get("author"), kind)
        if gated is None or is_yes(gated) == (target.settings.gated is not None)
    ]
    infos = [(_info(target, commit), target, commit) for target, commit in repos]
    if order is not None:
        infos.sort(key=lambda item: str(item[0][order]), reverse=True)
    full = flag(request, "full")
    return AsciiJSONResponse(
        [_expanded(request, info, target, commit.oid, full=full) for info, target, commit in infos[:limit]]
    )


def repo_info(request: Request) -> Response:
    target = hub_of(request).readable(request)
    commit = target.git.resolve(revision_of(request))
    check_parameters(request, "blobs", "expand", "expand[]")
    info = _info(target, target.git.commit_info(commit))
    return AsciiJSONResponse(_expanded(request, info, target, commit, full=True))


@with_json(require_writable)
def update_settings(request: Request, body: Body) -> Response:
    hub = hub_of(request)
    target = hub.writable(request)
    unknown = sorted(set(body) - {"private", "visibility", "gated"})
    if unknown:
        raise bad_request(
            f"the embedded Hub does not implement these settings: {printable(', '.join(unknown))}"
        )
    settings = target.settings
    if "private" in body or "visibility" in body:
        settings = replace(settings, private=_private_in_body(body))
    if "gated" in body:
        gated = body["gated"]
        if gated not in (False, "auto", "manual"):
            raise bad_request('"gated" must be false, "auto" or "manual"')
        settings = replace(settings, gated=str(gated) if gated else None)
    if (settings.private or settings.gated) and target.caller.token is None:
        raise bad_request("a private or gated repository needs a token, else nobody could read it")
    hub.store.update(target.id, settings)
    return AsciiJSONResponse({"private": settings.private, "gated": settings.gated or False})


def _repo_in_body(body: Body, caller: Caller) -> RepoId:
    name = string(body, "name")
    namespace = string(body, "organization", "")
    # Some clients send the full id as the name.
    if not namespace and name.count("/") == 1:
        namespace, name = name.split("/")
    if not namespace:
        if caller.token is None:
            raise bad_request(f"name the owner too: 'owner/{printable(name)}'")
        namespace = caller.name
    return repo_id(_kind_in_body(body), namespace, name)


def _kind_in_body(body: Body) -> RepoKind:
    kind = KINDS.get(f"{string(body, 'type', 'model')}s")
    if kind is None:
        raise bad_request("the embedded Hub serves kernel and model repositories only")
    return kind


def _private_in_body(body: Body) -> bool:
    visibility = body.get("visibility")
    private = body.get("private", False)
    if visibility not in (None, "public", "private"):
        raise bad_request('"visibility" must be "public" or "private"')
    if not isinstance(private, bool | None):
        raise bad_request('"private" must be true or false')
    return visibility == "private" or bool(private)


def _expanded(
    request: Request, info: dict[str, object], target: Target, commit: str, *, full: bool
) -> dict[str, object]:
    """The fields of a description that a request asks for: ``expand``, or all with the files if ``full``."""
    query = request.query_params
    properties = {*query.getlist("expand"), *query.getlist("expand[]")}
    unknown = sorted(properties - {*info, "siblings"})
    if unknown:
        raise bad_request(f"the embedded Hub does not keep these properties: {printable(', '.join(unknown))}")
    if "siblings" in properties if properties else full:
        files = target.git.files(commit)
        if flag(request, "blobs"):
            info["siblings"] = [_sibling(file) for file in target.git.describe(files.items())]
        else:
            info["siblings"] = [{"rfilename": path} for path in files]
    if properties:
        info = {key: value for key, value in info.items() if key in properties | {"id", "_id"}}
    return info


def _sibling(file: PathInfo) -> dict[str, object]:
    item: dict[str, object] = {"rfilename": file.path, "size": file.size, "blobId": file.entry.oid}
    if file.large is not None:
        item["lfs"] = lfs_json(file.large) | {"sha256": file.large.sha256}
    return item


def _info(target: Target, commit: CommitInfo) -> dict[str, object]:
    repo = target.id
    return {
        "_id": f"{repo.kind}:{repo}",
        "id": str(repo),
        f"{repo.kind}Id": str(repo),
        "author": repo.namespace,
        "sha": commit.oid,
        "lastModified": iso_time(commit.time),
        "createdAt": iso_time(target.settings.created),
        "private": target.settings.private,
        "gated": target.settings.gated or False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "trendingScore": 0,
        "tags": [],
    }


def check_access(request: Request) -> Response:
    hub_of(request).readable(request, content=True)
    return AsciiJSONResponse({})


def check_write_access(request: Request) -> Response:
    hub_of(request).writable(request)
    return AsciiJSONResponse({})


def without_namespace(request: Request) -> Response:
    """The answer for ids like ``gpt2``, which clients ask for to learn whether there is such a repository."""
    if request.path_params.get("kind", "models") not in KINDS:
        raise HTTPException(404)
    hub = hub_of(request)
    raise hub.repo_not_found(hub.caller(request))


_VERBS = (
    "auth-check", "branch", "commit", "commits", "discussions", "like", "paths-info", "preupload", "refs", "revision",
    "settings", "tag", "tree",
)  # fmt: skip
_ANY_METHOD = ["GET", "POST", "PUT", "DELETE"]

routes = [
    Route("/api/repos/create", create_repo, methods=["POST"]),
    Route("/api/repos/move", move_repo, methods=["POST"]),
    Route("/api/repos/delete", delete_repo, methods=["DELETE"]),
    Route("/api/{kind}", list_repos),
    Route(API_REPO, repo_info),
    Route(API_REPO + "/revision/{ref}", repo_info),
    Route(API_REPO + "/settings", update_settings, methods=["PUT"]),
    Route(API_REPO + "/auth-check", check_access),
    Route(API_REPO + "/auth-check/write", check_write_access),
]

# After all others, whose addresses these would hide.
routes_without_namespace = [
    Route("/api/{kind}/{name}", without_namespace),
    *(
        Route(f"/api/{{kind}}/{{name}}/{verb}/{{rest:path}}", without_namespace, methods=_ANY_METHOD)
        for verb in _VERBS
    ),
    *(Route(f"/api/{{kind}}/{{name}}/{verb}", without_namespace, methods=_ANY_METHOD[1:]) for verb in _VERBS),
    *(Route(f"/{{name}}/{verb}/{{rest:path}}", without_namespace) for verb in ("resolve", "raw")),
]
