"""Routes of trees, of facts about paths, and of history."""

from __future__ import annotations

from html import escape
from itertools import islice
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..git.lfs_objects import LargeFile
from ..git.reader import CommitInfo, PathInfo
from ..names import file_path
from .context import API_REPO, hub_of, require_readable, revision_of
from .messages import (
    MAX_QUESTION_BYTES,
    AsciiJSONResponse,
    check_parameters,
    choice,
    flag,
    is_yes,
    iso_time,
    next_page,
    number,
    segment,
    whole_body,
)
from .problems import bad_request

TREE_PAGE = 1000
EXPANDED_TREE_PAGE = 50
COMMITS_PAGE = 50
_MAX_PATHS = 5000


def list_tree(request: Request) -> Response:
    git = hub_of(request).readable(request).git
    commit = git.resolve(revision_of(request))
    path = folder_path(request)
    check_parameters(request, "expand", "recursive", "cursor", "limit")
    expand = flag(request, "expand")
    largest = EXPANDED_TREE_PAGE if expand else TREE_PAGE
    start = number(request, "cursor", 0, lowest=0)
    size = min(number(request, "limit", largest, lowest=1), largest)
    entries = git.walk(commit, path, recursive=flag(request, "recursive"))
    page = list(islice(entries, start, start + size + 1))
    headers = {} if len(page) <= size else next_page(request, cursor=start + size)
    infos = git.describe(page[:size])
    last = git.last_commits(commit, [info.path for info in infos]) if expand else {}
    return AsciiJSONResponse([_path_json(info, last.get(info.path)) for info in infos], headers=headers)


def folder_path(request: Request) -> str:
    """The folder that a tree's address names; empty for the root.

    Raises:
        InvalidInput: It cannot be a path.
    """
    path = segment(request, "path", "").strip("/")
    return file_path(path) if path else ""


async def paths_info(request: Request) -> Response:
    await run_in_threadpool(require_readable, request)
    body = await whole_body(request, MAX_QUESTION_BYTES)
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
    infos = [info for info in (git.path_info(commit, path) for path in paths) if info is not None]
    expand = is_yes(form.get("expand", [""])[-1])
    last = git.last_commits(commit, [info.path for info in infos]) if expand else {}
    return AsciiJSONResponse([_path_json(info, last.get(info.path)) for info in infos])


def list_commits(request: Request) -> Response:
    git = hub_of(request).readable(request).git
    commit = git.resolve(revision_of(request))
    check_parameters(request, "p", "limit", "expand", "expand[]")
    page = number(request, "p", 0, lowest=0)
    size = min(number(request, "limit", COMMITS_PAGE, lowest=1), COMMITS_PAGE)
    infos = list(islice(git.history(commit), page * size, (page + 1) * size + 1))
    headers = {} if len(infos) <= size else next_page(request, p=page + 1)
    formatted = "formatted" in (choice(request, name, "formatted") for name in ("expand[]", "expand"))
    return AsciiJSONResponse([_commit_json(info, formatted) for info in infos[:size]], headers=headers)


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
        title, message = (escape(text, quote=False) for text in (info.title, info.description))
        item["formatted"] = {"title": title, "message": message}
    return item


def lfs_json(large: LargeFile) -> dict[str, object]:
    """A large file as the API describes it."""
    return {"oid": large.sha256, "size": large.size, "pointerSize": len(large.pointer)}


routes = [
    Route(API_REPO + "/tree/{ref}", list_tree),
    Route(API_REPO + "/tree/{ref}/{path:path}", list_tree),
    Route(API_REPO + "/paths-info/{ref}", paths_info, methods=["POST"]),
    Route(API_REPO + "/commits/{ref}", list_commits),
]
