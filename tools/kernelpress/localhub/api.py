"""The repository API: everything below ``/api/kernels`` and ``/api/models``, and ``/api/repos``."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from urllib.parse import parse_qs, quote, urlencode

from dulwich.errors import NotGitRepository
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .context import (
    AsciiJSONResponse,
    Caller,
    Target,
    body_chunks,
    endpoint,
    hub_of,
    iso_time,
    json_object,
    segment,
    string,
)
from .paths import KINDS, RepoId, RepoKind, file_path, printable, ref_name, repo_id
from .problems import Problem, bad_request, conflict, entry_not_found
from .repository import DEFAULT_BRANCH, CommitInfo, PathInfo
from .store import Settings

TREE_PAGE = 1000
EXPANDED_TREE_PAGE = 50
COMMITS_PAGE = 50
_MAX_PATHS = 5000


# Repositories


async def create_repo(request: Request) -> Response:
    body = await json_object(request)
    return await run_in_threadpool(_create_repo, request, body)


def _create_repo(request: Request, body: dict[str, object]) -> Response:
    hub = hub_of(request)
    caller = hub.caller(request)
    hub.require_write(caller)
    repo = _repo_in_body(body, caller)
    url = f"{endpoint(request)}/{repo.web_path}"
    private = _wants_private(body)
    if private and not hub.tokens.any_exist():
        raise bad_request(
            "a private repository needs a token, else nobody could read it: create one with "
            "'kernelpress token create NAME' on the Hub's machine and set HF_TOKEN to it"
        )
    try:
        hub.store.create(repo, private=private, author=caller.name)
    except Problem as problem:
        # The client reads the address even from this answer when told that existing is fine.
        raise conflict(problem.message, url=url) from problem
    return AsciiJSONResponse({"url": url, "name": str(repo), "id": str(repo)})


async def delete_repo(request: Request) -> Response:
    body = await json_object(request)
    return await run_in_threadpool(_delete_repo, request, body)


def _delete_repo(request: Request, body: dict[str, object]) -> Response:
    hub = hub_of(request)
    caller = hub.caller(request)
    hub.require_write(caller)
    repo = _repo_in_body(body, caller)
    if not hub.store.delete(repo):
        raise hub.repo_not_found(repo, caller)
    return AsciiJSONResponse({})


def list_repos(request: Request) -> Response:
    hub = hub_of(request)
    caller = hub.caller(request)
    query = request.query_params
    limit = _number(request, "limit", 1000, lowest=0)
    search, author = query.get("search", "").lower(), query.get("author")
    found = []
    for repo in hub.store.repositories(_listed_kind(request)):
        if search in str(repo).lower() and author in (None, repo.namespace) and hub.visible(repo, caller):
            git = hub.store.get(repo)
            # One that goes away in this moment is not listed.
            with suppress(NotGitRepository, FileNotFoundError):
                if git is not None:
                    target = Target(repo, git, hub.store.settings(repo), caller)
                    found.append(_info(target, git.resolve(DEFAULT_BRANCH)))
    if query.get("sort") == "lastModified":
        found.sort(key=lambda info: str(info["lastModified"]), reverse=True)
    return AsciiJSONResponse(found[:limit])


def repo_info(request: Request) -> Response:
    target = hub_of(request).readable(request)
    commit = target.git.resolve(_revision(request))
    info = _info(target, commit)
    query = request.query_params
    root = target.git.entry(commit, "")
    assert root is not None
    files = [item for item in target.git.walk(root, "", True) if not item[1].is_folder]
    if _flag(request, "blobs"):
        info["siblings"] = [
            {"rfilename": file.path, "size": file.size, "blobId": file.entry.oid}
            for file in target.git.describe(files)
        ]
    else:
        info["siblings"] = [{"rfilename": path} for path, _ in files]
    wanted = {*query.getlist("expand"), *query.getlist("expand[]")}
    if wanted:
        info = {key: value for key, value in info.items() if key in wanted | {"id", "_id"}}
    return AsciiJSONResponse(info)


async def update_settings(request: Request) -> Response:
    body = await json_object(request)
    return await run_in_threadpool(_update_settings, request, body)


def _update_settings(request: Request, body: dict[str, object]) -> Response:
    hub = hub_of(request)
    target = hub.writable(request)
    unknown = sorted(set(body) - {"private", "visibility"})
    if unknown:
        raise bad_request(
            f"the embedded Hub does not implement these settings: {printable(', '.join(unknown))}"
        )
    private = _wants_private(body)
    if private and target.caller.token is None:
        raise bad_request("a private repository needs a token, else nobody could read it")
    hub.store.update(target.id, Settings(private=private, created=target.settings.created))
    return AsciiJSONResponse({"private": private})


# Refs


def list_refs(request: Request) -> Response:
    git = hub_of(request).readable(request).git
    return AsciiJSONResponse(
        {
            "branches": _ref_list(git.branches(), "refs/heads/"),
            "tags": _ref_list(git.tags(), "refs/tags/"),
            "converts": [],
            "pullRequests": [],
        }
    )


async def create_branch(request: Request) -> Response:
    body = await json_object(request)
    return await run_in_threadpool(_create_branch, request, body)


def _create_branch(request: Request, body: dict[str, object]) -> Response:
    git = hub_of(request).writable(request).git
    name = ref_name(segment(request, "ref"), "branch")
    git.create_branch(name, git.resolve(string(body, "startingPoint", DEFAULT_BRANCH)))
    return AsciiJSONResponse({})


def delete_branch(request: Request) -> Response:
    hub_of(request).writable(request).git.delete_branch(segment(request, "ref"))
    return AsciiJSONResponse({})


async def create_tag(request: Request) -> Response:
    body = await json_object(request)
    return await run_in_threadpool(_create_tag, request, body)


def _create_tag(request: Request, body: dict[str, object]) -> Response:
    target = hub_of(request).writable(request)
    name = ref_name(string(body, "tag"), "tag")
    message = string(body, "message", "")
    try:
        message.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request('"message" is not valid Unicode') from None
    commit = target.git.resolve(segment(request, "ref"))
    target.git.create_tag(name, commit, message, target.caller.name)
    return AsciiJSONResponse({})


def delete_tag(request: Request) -> Response:
    hub_of(request).writable(request).git.delete_tag(segment(request, "ref"))
    return AsciiJSONResponse({})


# Trees and history


def list_tree(request: Request) -> Response:
    git = hub_of(request).readable(request).git
    commit = git.resolve(_revision(request))
    path = segment(request, "path").strip("/") if "path" in request.path_params else ""
    folder = git.entry(commit, file_path(path) if path else "")
    if folder is None or not folder.is_folder:
        raise entry_not_found(f"there is no folder {printable(path)!r} at this revision")
    expand = _flag(request, "expand")
    start = _number(request, "cursor", 0, lowest=0)
    size = _number(request, "limit", EXPANDED_TREE_PAGE if expand else TREE_PAGE, lowest=1)
    size = min(size, EXPANDED_TREE_PAGE if expand else TREE_PAGE)
    found = list(islice(git.walk(folder, path, _flag(request, "recursive")), start, start + size + 1))
    page = git.describe(found[:size])
    last = git.last_commits(commit, [item.path for item in page]) if expand else {}
    headers = {} if len(found) <= size else _next_page(request, cursor=start + size)
    return AsciiJSONResponse([_path_json(item, last.get(item.path)) for item in page], headers=headers)


async def paths_info(request: Request) -> Response:
    body = b"".join([chunk async for chunk in body_chunks(request, 8 << 20)])
    try:
        form = parse_qs(
            body.decode("utf-8"), keep_blank_values=True, errors="strict", max_num_fields=_MAX_PATHS
        )
    except ValueError:
        raise bad_request(f"expected a form with at most {_MAX_PATHS} fields, in UTF-8") from None
    return await run_in_threadpool(_paths_info, request, form)


def _paths_info(request: Request, form: dict[str, list[str]]) -> Response:
    git = hub_of(request).readable(request).git
    commit = git.resolve(_revision(request))
    paths = [file_path(path.strip("/")) for path in form.get("paths", [])]
    found = [info for info in (git.path_info(commit, path) for path in paths) if info is not None]
    expand = form.get("expand", ["false"])[-1].lower() in ("1", "true")
    last = git.last_commits(commit, [info.path for info in found]) if expand else {}
    return AsciiJSONResponse([_path_json(info, last.get(info.path)) for info in found])


def list_commits(request: Request) -> Response:
    git = hub_of(request).readable(request).git
    commit = git.resolve(_revision(request))
    page = _number(request, "p", 0, lowest=0)
    size = min(_number(request, "limit", COMMITS_PAGE, lowest=1), COMMITS_PAGE)
    found = list(islice(git.history(commit), page * size, (page + 1) * size + 1))
    headers = {} if len(found) <= size else _next_page(request, p=page + 1)
    formatted = "formatted" in (request.query_params.get("expand[]"), request.query_params.get("expand"))
    return AsciiJSONResponse([_commit_json(info, formatted) for info in found[:size]], headers=headers)


# Helpers


def _repo_in_body(body: dict[str, object], caller: Caller) -> RepoId:
    name = string(body, "name")
    namespace = string(body, "organization", "")
    # Some clients send the full id as the name.
    if not namespace and name.count("/") == 1:
        namespace, name = name.split("/")
    if not namespace:
        if caller.token is None:
            raise bad_request(f"name the owner too: 'owner/{printable(name)}'")
        namespace = caller.name
    kind = KINDS.get(f"{string(body, 'type', 'model')}s")
    if kind is None:
        raise bad_request("the embedded Hub serves kernel and model repositories only")
    return repo_id(kind, namespace, name)


def _wants_private(body: dict[str, object]) -> bool:
    visibility = body.get("visibility")
    private = body.get("private", False)
    if visibility not in (None, "public", "private"):
        raise bad_request('"visibility" must be "public" or "private"')
    if not isinstance(private, bool | None):
        raise bad_request('"private" must be true or false')
    return visibility == "private" or bool(private)


def _listed_kind(request: Request) -> RepoKind:
    kind = KINDS.get(request.path_params["kind"])
    if kind is None:
        raise Problem(404, "the embedded Hub lists kernels and models only")
    return kind


def _revision(request: Request) -> str:
    return segment(request, "ref") if "ref" in request.path_params else DEFAULT_BRANCH


def _info(target: Target, commit: str) -> dict[str, object]:
    repo = target.id
    return {
        "_id": f"{repo.kind}:{repo}",
        "id": str(repo),
        f"{repo.kind}Id": str(repo),
        "author": repo.namespace,
        "sha": commit,
        "lastModified": iso_time(target.git.commit_info(commit).time),
        "createdAt": iso_time(target.settings.created),
        "private": target.settings.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
    }


def _ref_list(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
    return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]


def _path_json(info: PathInfo, last: CommitInfo | None) -> dict[str, object]:
    item: dict[str, object] = {
        "type": "directory" if info.entry.is_folder else "file",
        "oid": info.entry.oid,
        "size": info.size or 0,
        "path": info.path,
    }
    if last is not None:
        item["lastCommit"] = {"id": last.oid, "title": last.title, "date": iso_time(last.time)}
    return item


def _commit_json(info: CommitInfo, formatted: bool) -> dict[str, object]:
    item: dict[str, object] = {
        "id": info.oid,
        "title": info.title,
        "message": info.description,
        "authors": [{"user": info.author}],
        "date": iso_time(info.time),
    }
    if formatted:
        item["formatted"] = {"title": _escaped(info.title), "message": _escaped(info.description)}
    return item


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _next_page(request: Request, **changes: int) -> dict[str, str]:
    kept = [(key, value) for key, value in request.query_params.multi_items() if key not in changes]
    query = urlencode([*kept, *((key, str(value)) for key, value in changes.items())])
    path = quote(request.scope["path"], safe="/%:@")
    return {"Link": f'<{endpoint(request)}{path}?{query}>; rel="next"'}


def _flag(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in ("1", "true")


def _number(request: Request, name: str, default: int, *, lowest: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= lowest):
        raise bad_request(f"{name!r} must be a whole number of at least {lowest}")
    return int(text)


def routes() -> Iterable[Route]:
    """The routes of this module."""
    repo = "/api/{kind}/{namespace}/{name}"
    yield Route("/api/repos/create", create_repo, methods=["POST"])
    yield Route("/api/repos/delete", delete_repo, methods=["DELETE"])
    yield Route("/api/{kind}", list_repos)
    yield Route(repo, repo_info)
    yield Route(repo + "/revision/{ref}", repo_info)
    yield Route(repo + "/settings", update_settings, methods=["PUT"])
    yield Route(repo + "/refs", list_refs)
    yield Route(repo + "/branch/{ref}", create_branch, methods=["POST"])
    yield Route(repo + "/branch/{ref}", delete_branch, methods=["DELETE"])
    yield Route(repo + "/tag/{ref}", create_tag, methods=["POST"])
    yield Route(repo + "/tag/{ref}", delete_tag, methods=["DELETE"])
    yield Route(repo + "/tree/{ref}", list_tree)
    yield Route(repo + "/tree/{ref}/{path:path}", list_tree)
    yield Route(repo + "/paths-info/{ref}", paths_info, methods=["POST"])
    yield Route(repo + "/commits/{ref}", list_commits)
