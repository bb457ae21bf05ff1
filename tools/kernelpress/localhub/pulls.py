"""Pull requests: a commit that no branch points to yet, with what its author says about it.

<repository>.git/refs/pr/<number>       where it is
<repository>.git/pulls/<number>.json    what is known about it
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .context import Target, hub_of
from .messages import AsciiJSONResponse, endpoint, iso_time, json_object, number, segment, string
from .objects import sync
from .problems import Problem, bad_request, conflict
from .refs import PULLS
from .repository import DEFAULT_BRANCH, AddFile, DeleteFile, Operation, Repository
from .trees import TreeEntry

_PAGE = 50


@dataclass(frozen=True)
class Pull:
    """A pull request.

    Args:
        number: Its number.
        title: First line of its first commit's message.
        description: The rest of it.
        author: Who opened it.
        created: Seconds since the epoch.
        base: The commit of ``main`` that it was made on.
        status: ``open``, ``closed`` or ``merged``.
        merge: The commit that merged it.
    """

    number: int
    title: str
    description: str
    author: str
    created: int
    base: str
    status: str = "open"
    merge: str | None = None


def store(git: Repository, pull: Pull) -> None:
    """Keep what is known about a pull request, in place of what was."""
    folder = git.path / "pulls"
    folder.mkdir(exist_ok=True)
    aside = folder / f"{pull.number}.json.new"
    aside.write_text(json.dumps(asdict(pull)), "utf-8")
    sync(aside)
    os.replace(aside, folder / f"{pull.number}.json")
    sync(folder)


def load(git: Repository, number: int) -> Pull:
    """A pull request by its number.

    Raises:
        Problem: 404 when there is none.
    """
    path = git.path / "pulls" / f"{number}.json"
    try:
        return Pull(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        head = git.pulls().get(str(number))
        if head is None:
            raise Problem(404, f"there is no pull request {number}") from None
        # The Hub ended between its commit and its description: the commit says the same.
        return described(git, number, head)


def described(git: Repository, number: int, head: str) -> Pull:
    """A pull request as its commit describes it."""
    info = git.commit_info(head)
    base = info.parents[0] if info.parents else head
    return Pull(number, info.title, info.description, info.author, info.time, base)


def address(request: Request, target: Target, number: int) -> str:
    """Where people find a pull request."""
    return f"{endpoint(request)}/{target.id.web_path}/discussions/{number}"


def list_pulls(request: Request) -> Response:
    target = hub_of(request).readable(request)
    query = request.query_params
    if query.get("type") == "discussion":
        found = []
    else:
        numbers = sorted((int(name) for name in target.git.pulls() if name.isdigit()), reverse=True)
        found = [load(target.git, each) for each in numbers]
    if query.get("status") in ("open", "closed"):
        found = [each for each in found if (each.status == "open") == (query["status"] == "open")]
    if "author" in query:
        found = [each for each in found if each.author == query["author"]]
    start = number(request, "p", 0, lowest=0) * _PAGE
    page = [_json(target, each) for each in found[start : start + _PAGE]]
    return AsciiJSONResponse({"discussions": page, "count": len(found), "start": start})


def pull_details(request: Request) -> Response:
    target = hub_of(request).readable(request)
    pull = load(target.git, _number(request))
    events: list[dict[str, object]] = [
        {
            "id": f"{pull.number}-opened",
            "type": "comment",
            "createdAt": iso_time(pull.created),
            "author": {"name": pull.author},
            "data": {
                "edited": False,
                "hidden": False,
                "latest": {"raw": pull.description, "updatedAt": iso_time(pull.created)},
            },
        }
    ]
    head = target.git.resolve(f"{PULLS}{pull.number}")
    for info in target.git.history(head):
        if info.oid == pull.base:
            break
        event = {"id": info.oid, "type": "commit", "createdAt": iso_time(info.time)}
        data = {"subject": info.title, "oid": info.oid}
        events.append(event | {"author": {"name": info.author}, "data": data})
    _, conflicts = _merge_operations(target.git, pull, target.git.resolve(DEFAULT_BRANCH), head)
    changes: dict[str, object] = {"base": f"refs/heads/{DEFAULT_BRANCH}"}
    if pull.merge is not None:
        changes["mergeCommitId"] = pull.merge
    waiting = conflicts if pull.status == "open" else []
    details = {"changes": changes, "filesWithConflicts": waiting, "events": events, "diff": None}
    return AsciiJSONResponse(_json(target, pull) | details)


async def merge(request: Request) -> Response:
    body = await json_object(request)
    return await run_in_threadpool(_merge, request, body)


def _merge(request: Request, body: dict[str, object]) -> Response:
    target = hub_of(request).writable(request)
    git = target.git
    pull = _open(git, _number(request))
    head, main = git.resolve(f"{PULLS}{pull.number}"), git.resolve(DEFAULT_BRANCH)
    operations, conflicts = _merge_operations(git, pull, main, head)
    if conflicts:
        raise conflict(f"main has changed these since: {', '.join(conflicts)}; open a new pull request")
    with git.batch() as batch:
        done = git.commit(
            DEFAULT_BRANCH,
            operations,
            batch=batch,
            message=f"Merge pull request {pull.number}: {pull.title}",
            author=target.caller.name,
            parent=main,
            merged=head,
        )
    store(git, replace(pull, status="merged", merge=done))
    return AsciiJSONResponse({"oid": done})


async def set_status(request: Request) -> Response:
    body = await json_object(request)
    return await run_in_threadpool(_set_status, request, body)


def _set_status(request: Request, body: dict[str, object]) -> Response:
    target = hub_of(request).writable(request)
    status = string(body, "status")
    if status not in ("open", "closed"):
        raise bad_request('"status" must be "open" or "closed"')
    pull = load(target.git, _number(request))
    if pull.status == "merged":
        raise conflict("this pull request is merged")
    store(target.git, replace(pull, status=status))
    event = {
        "id": f"{pull.number}-{status}",
        "type": "status-change",
        "createdAt": iso_time(int(time.time())),
    }
    return AsciiJSONResponse(
        {"newStatus": event | {"author": {"name": target.caller.name}, "data": {"status": status}}}
    )


def _open(git: Repository, number: int) -> Pull:
    pull = load(git, number)
    if pull.status != "open":
        raise conflict(f"pull request {number} is {pull.status}")
    return pull


def _number(request: Request) -> int:
    text = segment(request, "number")
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise Problem(404, "there is no such pull request")
    return int(text)


def _json(target: Target, pull: Pull) -> dict[str, object]:
    return {
        "num": pull.number,
        "title": pull.title,
        "author": {"name": pull.author},
        "createdAt": iso_time(pull.created),
        "status": pull.status,
        "isPullRequest": True,
        "repo": {"name": str(target.id), "type": target.id.kind},
    }


def _merge_operations(git: Repository, pull: Pull, main: str, head: str) -> tuple[list[Operation], list[str]]:
    """What brings the pull request's changes to ``main``, and the paths that both have changed differently."""
    base, ours, theirs = (_files(git, commit) for commit in (pull.base, main, head))
    operations: list[Operation] = []
    conflicts = []
    for path in sorted(base.keys() | theirs.keys()):
        entry = theirs.get(path)
        if entry == base.get(path) or entry == ours.get(path):
            continue
        if ours.get(path) != base.get(path):
            conflicts.append(path)
        elif entry is None:
            operations.append(DeleteFile(path))
        else:
            operations.append(AddFile(path, entry.oid))
    return operations, conflicts


def _files(git: Repository, commit: str) -> dict[str, TreeEntry]:
    root = git.entry(commit, "")
    assert root is not None
    return {path: entry for path, entry in git.walk(root, "", True) if not entry.is_folder}


def routes() -> Iterable[Route]:
    """The routes of this module."""
    base = "/api/{kind}/{namespace}/{name}/discussions"
    yield Route(base, list_pulls)
    yield Route(base + "/{number}", pull_details)
    yield Route(base + "/{number}/merge", merge, methods=["POST"])
    yield Route(base + "/{number}/status", set_status, methods=["POST"])
