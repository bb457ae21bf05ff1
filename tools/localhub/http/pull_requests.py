"""Pull requests: a commit that no branch points to yet, with what its author says about it; and their routes.

<repository>.git/refs/pr/<number>       its newest commit
<repository>.git/pulls/<number>.json    its title, status and so on
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..git import attributes
from ..git.objects import replace_durably
from ..git.refs import PULLS
from ..git.repository import DEFAULT_BRANCH, AddFile, DeleteFile, Operation, Repository
from ..git.tree_editor import TreeEntry
from .context import API_REPO, Target, hub_of, require_writable
from .messages import (
    AsciiJSONResponse,
    Body,
    check_parameters,
    choice,
    endpoint,
    iso_time,
    number,
    segment,
    string,
    whole_number,
    with_json,
)
from .problems import Problem, bad_request, conflict

_PAGE = 50


@dataclass(frozen=True)
class PullRequest:
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


def save(git: Repository, pull: PullRequest) -> None:
    """Keep a pull request, in place of its former state."""
    folder = git.path / "pulls"
    folder.mkdir(exist_ok=True)
    replace_durably(folder / f"{pull.number}.json", json.dumps(asdict(pull)))


def load(git: Repository, number: int) -> PullRequest:
    """A pull request by its number.

    Raises:
        Problem: 404 when there is none.
    """
    try:
        return PullRequest(**json.loads((git.path / "pulls" / f"{number}.json").read_text("utf-8")))
    except FileNotFoundError:
        head = git.pulls().get(str(number))
        if head is None:
            raise Problem(404, f"there is no pull request {number}") from None
        # The Hub ended between its commit and its description: the commit says the same.
        return described(git, number, head)


def load_all(git: Repository) -> Iterator[PullRequest]:
    """All pull requests, newest first."""
    for name in sorted(git.pulls(), key=int, reverse=True):
        yield load(git, int(name))


def load_named(git: Repository, request: Request) -> PullRequest:
    """The pull request that the request's path names.

    Raises:
        Problem: 404 when there is none.
    """
    pull_number = whole_number(segment(request, "number"))
    if pull_number is None:
        raise Problem(404, "there is no such pull request")
    return load(git, pull_number)


def described(git: Repository, number: int, head: str) -> PullRequest:
    """A pull request as its commit describes it."""
    info = git.commit_info(head)
    base = info.parents[0] if info.parents else head
    return PullRequest(number, info.title, info.description, info.author, info.time, base)


def pull_request_url(request: Request, target: Target, number: int) -> str:
    """The address of a pull request's page."""
    return f"{endpoint(request)}/{target.id.web_path}/discussions/{number}"


def list_pulls(request: Request) -> Response:
    target = hub_of(request).readable(request)
    check_parameters(request, "type", "status", "author", "p")
    query = request.query_params
    kind = choice(request, "type", "all", "discussion", "pull_request")
    status = choice(request, "status", "all", "open", "closed")
    pulls = [] if kind == "discussion" else list(load_all(target.git))
    if status in ("open", "closed"):
        pulls = [pull for pull in pulls if (pull.status == "open") == (status == "open")]
    if "author" in query:
        pulls = [pull for pull in pulls if pull.author == query["author"]]
    start = number(request, "p", 0, lowest=0) * _PAGE
    page = [_json(target, pull) for pull in pulls[start : start + _PAGE]]
    return AsciiJSONResponse({"discussions": page, "count": len(pulls), "start": start})


def pull_details(request: Request) -> Response:
    target = hub_of(request).readable(request)
    # The client asks for the difference and takes an answer without it.
    check_parameters(request, "diff")
    pull = load_named(target.git, request)
    opened = iso_time(pull.created)
    comment = {
        "edited": False,
        "hidden": False,
        "latest": {"raw": pull.description, "updatedAt": opened},
    }
    events = [_event(f"{pull.number}-opened", "comment", pull.created, pull.author, comment)]
    head = target.git.resolve(f"{PULLS}{pull.number}")
    for info in target.git.history(head):
        if info.oid == pull.base:
            break
        subject = {"subject": info.title, "oid": info.oid}
        events.append(_event(info.oid, "commit", info.time, info.author, subject))
    _, conflicts = _merge_operations(target.git, pull, target.git.resolve(DEFAULT_BRANCH), head)
    changes: dict[str, object] = {"base": f"refs/heads/{DEFAULT_BRANCH}"}
    if pull.merge is not None:
        changes["mergeCommitId"] = pull.merge
    unmerged = conflicts if pull.status == "open" else []
    details = {"changes": changes, "filesWithConflicts": unmerged, "events": events, "diff": None}
    return AsciiJSONResponse(_json(target, pull) | details)


@with_json(require_writable)
def merge(request: Request, body: Body) -> Response:
    target = hub_of(request).writable(request)
    git = target.git
    pull = load_named(git, request)
    if pull.status != "open":
        raise conflict(f"pull request {pull.number} is {pull.status}")
    head, main = git.resolve(f"{PULLS}{pull.number}"), git.resolve(DEFAULT_BRANCH)
    operations, conflicts = _merge_operations(git, pull, main, head)
    if conflicts:
        raise conflict(f"main has changed these since: {', '.join(conflicts)}; open a new pull request")
    with git.batch() as batch:
        merge_commit = git.commit(
            DEFAULT_BRANCH,
            operations,
            batch=batch,
            message=f"Merge pull request {pull.number}: {pull.title}",
            author=target.caller.name,
            parent=main,
            merged=head,
        )
    save(git, replace(pull, status="merged", merge=merge_commit))
    return AsciiJSONResponse({"oid": merge_commit})


@with_json(require_writable)
def set_status(request: Request, body: Body) -> Response:
    target = hub_of(request).writable(request)
    status = string(body, "status")
    if status not in ("open", "closed"):
        raise bad_request('"status" must be "open" or "closed"')
    pull = load_named(target.git, request)
    if pull.status == "merged":
        raise conflict("this pull request is merged")
    save(target.git, replace(pull, status=status))
    oid = f"{pull.number}-{status}"
    event = _event(oid, "status-change", int(time.time()), target.caller.name, {"status": status})
    return AsciiJSONResponse({"newStatus": event})


def _event(oid: str, kind: str, at: int, author: str, data: Body) -> dict[str, object]:
    return {"id": oid, "type": kind, "createdAt": iso_time(at), "author": {"name": author}, "data": data}


def _json(target: Target, pull: PullRequest) -> dict[str, object]:
    return {
        "num": pull.number,
        "title": pull.title,
        "author": {"name": pull.author},
        "createdAt": iso_time(pull.created),
        "status": pull.status,
        "isPullRequest": True,
        "repo": {"name": str(target.id), "type": target.id.kind},
    }


def _merge_operations(
    git: Repository, pull: PullRequest, main: str, head: str
) -> tuple[list[Operation], list[str]]:
    """The changes that a pull request brings to ``main``, and the paths that both have changed differently."""
    base, ours, theirs = (git.files(commit) for commit in (pull.base, main, head))
    operations: list[Operation] = []
    conflicts = []
    for path in sorted(base.keys() | theirs.keys()):
        entry = theirs.get(path)
        if entry == base.get(path) or entry == ours.get(path):
            continue
        if path == attributes.FILE and _own_lines(git, entry) == _own_lines(git, base.get(path)):
            # The lines of large files come with the files.
            continue
        if ours.get(path) != base.get(path):
            conflicts.append(path)
        elif entry is None:
            operations.append(DeleteFile(path))
        else:
            large = entry.is_file and git.large_file(entry.oid) is not None
            operations.append(AddFile(path, entry.oid, large))
    return operations, conflicts


def _own_lines(git: Repository, entry: TreeEntry | None) -> str:
    """The lines of ``.gitattributes`` that people wrote."""
    data = git.head(entry.oid, attributes.MAX_BYTES) if entry is not None and entry.is_file else b""
    text = data.decode("utf-8", "surrogateescape")
    return attributes.with_patterns(text, attributes.patterns(text), set())


_BASE = API_REPO + "/discussions"

routes = [
    Route(_BASE, list_pulls),
    Route(_BASE + "/{number}", pull_details),
    Route(_BASE + "/{number}/merge", merge, methods=["POST"]),
    Route(_BASE + "/{number}/status", set_status, methods=["POST"]),
]
