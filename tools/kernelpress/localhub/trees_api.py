"""Trees, files' facts and history over HTTP."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from urllib.parse import parse_qs, quote, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .contents import CommitInfo, PathInfo
from .context import hub_of, revision_of
from .large import LargeFile
from .messages import AsciiJSONResponse, body_chunks, endpoint, flag, iso_time, number, segment
from .paths import file_path, printable
from .problems import bad_request, entry_not_found

TREE_PAGE = 1000
EXPANDED_TREE_PAGE = 50
COMMITS_PAGE = 50
_MAX_PATHS = 5000


def list_tree(request: Request) -> Response:
    git = hub_of(request).readable(request).git
    commit = git.resolve(revision_of(request))
    path = segment(request, "path").strip("/") if "path" in request.path_params else ""
    folder = git.entry(commit, file_path(path) if path else "")
    if folder is None or not folder.is_folder:
        raise entry_not_found(f"there is no folder {printable(path)!r} at this revision")
    expand = flag(request, "expand")
    start = number(request, "cursor", 0, lowest=0)
    size = number(request, "limit", EXPANDED_TREE_PAGE if expand else TREE_PAGE, lowest=1)
    size = min(size, EXPANDED_TREE_PAGE if expand else TREE_PAGE)
    found = list(islice(git.walk(folder, path, flag(request, "recursive")), start, start + size + 1))
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
    commit = git.resolve(revision_of(request))
    paths = [file_path(path.strip("/")) for path in form.get("paths", [])]
    found = [info for info in (git.path_info(commit, path) for path in paths) if info is not None]
    expand = form.get("expand", ["false"])[-1].lower() in ("1", "true")
    last = git.last_commits(commit, [info.path for info in found]) if expand else {}
    return AsciiJSONResponse([_path_json(info, last.get(info.path)) for info in found])


def list_commits(request: Request) -> Response:
    git = hub_of(request).readable(request).git
    commit = git.resolve(revision_of(request))
    page = number(request, "p", 0, lowest=0)
    size = min(number(request, "limit", COMMITS_PAGE, lowest=1), COMMITS_PAGE)
    found = list(islice(git.history(commit), page * size, (page + 1) * size + 1))
    headers = {} if len(found) <= size else _next_page(request, p=page + 1)
    formatted = "formatted" in (request.query_params.get("expand[]"), request.query_params.get("expand"))
    return AsciiJSONResponse([_commit_json(info, formatted) for info in found[:size]], headers=headers)


def _path_json(info: PathInfo, last: CommitInfo | None) -> dict[str, object]:
    item: dict[str, object] = {
        "type": "directory" if info.entry.is_folder else "file",
        "oid": info.entry.oid,
        "size": info.size or 0,
        "path": info.path,
    }
    if info.large is not None:
        item["lfs"] = lfs_json(info.large)
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


def lfs_json(large: LargeFile) -> dict[str, object]:
    """What the API says of a large file."""
    return {"oid": large.sha256, "size": large.size, "pointerSize": len(large.pointer)}


def _next_page(request: Request, **changes: int) -> dict[str, str]:
    kept = [(key, value) for key, value in request.query_params.multi_items() if key not in changes]
    query = urlencode([*kept, *((key, str(value)) for key, value in changes.items())])
    path = quote(request.scope["path"], safe="/%:@")
    return {"Link": f'<{endpoint(request)}{path}?{query}>; rel="next"'}


def routes() -> Iterable[Route]:
    """The routes of this module."""
    repo = "/api/{kind}/{namespace}/{name}"
    yield Route(repo + "/tree/{ref}", list_tree)
    yield Route(repo + "/tree/{ref}/{path:path}", list_tree)
    yield Route(repo + "/paths-info/{ref}", paths_info, methods=["POST"])
    yield Route(repo + "/commits/{ref}", list_commits)
