"""Routes by which files get in: the preupload question and the commit that carries them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

from dulwich.objects import Blob
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..git.lfs_objects import LargeFile
from ..git.reader import PathInfo
from ..git.refs import BRANCHES
from ..git.repository import DEFAULT_BRANCH, Repository
from ..names import file_path, printable
from .commit_body import MAX_BODY_BYTES, MAX_FILE_BYTES, MAX_LINE_BYTES, parse_commit
from .context import API_REPO, hub_of, require_writable
from .gitignore import MAX_BYTES, GitIgnore
from .messages import (
    AsciiJSONResponse,
    Body,
    check_parameters,
    endpoint,
    flag,
    segment,
    spooled_body,
    string,
    with_json,
)
from .problems import bad_request
from .pull_requests import described, pull_request_url, save

_DIGEST = re.compile(r"[0-9a-f]{64}")


@with_json(require_writable)
def preupload(request: Request, body: Body) -> Response:
    _check_pull_request(request)
    git = hub_of(request).writable(request).git
    commit = git.resolve(segment(request, "ref"))
    files = body.get("files")
    if not isinstance(files, list):
        raise bad_request('"files" must be a list')
    gitignore = _gitignore(git, commit, body)
    answers = []
    for item in files:
        if not isinstance(item, dict):
            raise bad_request('each of "files" must be an object')
        path = file_path(string(item, "path"))
        size = item.get("size")
        if not isinstance(size, int) or size < 0:
            raise bad_request('"size" must be a whole number of bytes')
        info = git.path_info(commit, path)
        answers.append(
            {
                "path": path,
                "uploadMode": "regular" if size <= MAX_FILE_BYTES else "lfs",
                "shouldIgnore": gitignore.ignores(path),
                "oid": None if info is None else _content_id(info),
            }
        )
    return AsciiJSONResponse({"files": answers})


def _content_id(info: PathInfo) -> str | None:
    """The id by which the client tells whether a file's content has changed."""
    if not info.entry.is_file:
        return None
    return info.entry.oid if info.large is None else info.large.sha256


async def commit(request: Request) -> Response:
    _check_pull_request(request)
    # Nothing is read from a caller who may not write.
    await run_in_threadpool(require_writable, request)
    with await spooled_body(request, MAX_BODY_BYTES) as body:
        return await run_in_threadpool(_commit, request, body)


def _commit(request: Request, body: IO[bytes]) -> Response:
    target = hub_of(request).writable(request)
    git, author = target.git, target.caller.name

    def large(path: str, digest: str) -> LargeFile:
        size = git.large.size(digest) if _DIGEST.fullmatch(digest) else None
        if size is None:
            raise bad_request(f"{printable(path)!r}: upload the file's content first (LFS batch API)")
        return LargeFile(digest, size)

    with git.batch() as batch:
        parsed = parse_commit(_lines(body), lambda data: batch.add(Blob.from_string(data)), large)
        answer: dict[str, object] = {"success": True, "hookOutput": ""}
        if flag(request, "create_pr"):
            main = git.resolve(DEFAULT_BRANCH)
            base = parsed.parent or main
            if all(info.oid != base for info in git.history(main)):
                raise bad_request(f"the parent commit {base} is none of {DEFAULT_BRANCH}")
            number, oid = git.open_pull(
                base, parsed.operations, batch=batch, message=parsed.message, author=author
            )
            save(git, described(git, number, oid))
            answer["pullRequestUrl"] = pull_request_url(request, target, number)
        else:
            oid = git.commit(
                _branch(request),
                parsed.operations,
                batch=batch,
                message=parsed.message,
                author=author,
                parent=parsed.parent,
            )
    url = f"{endpoint(request)}/{target.id.web_path}/commit/{oid}"
    return AsciiJSONResponse(answer | {"commitOid": oid, "commitUrl": url})


def _branch(request: Request) -> str:
    return segment(request, "ref").removeprefix(BRANCHES)


def _check_pull_request(request: Request) -> None:
    check_parameters(request, "create_pr")
    branch = _branch(request)
    if flag(request, "create_pr") and branch != DEFAULT_BRANCH:
        raise bad_request(f"pull requests are for {DEFAULT_BRANCH} only, not for {printable(branch)!r}")


def _lines(body: IO[bytes]) -> Iterator[bytes]:
    # One byte more than allowed is enough to see that a line is too long.
    while line := body.readline(MAX_LINE_BYTES + 1):
        yield line


def _gitignore(git: Repository, commit: str, body: Body) -> GitIgnore:
    """The patterns that the client sends, or else those at the repository's root."""
    text = body.get("gitIgnore")
    if not isinstance(text, str):
        entry = git.entry(commit, ".gitignore")
        # One byte more is enough to see that it is too long.
        content = git.head(entry.oid, MAX_BYTES + 1) if entry is not None and entry.is_file else b""
        text = content.decode("utf-8", "replace")
    return GitIgnore(text)


routes = [
    Route(API_REPO + "/preupload/{ref}", preupload, methods=["POST"]),
    Route(API_REPO + "/commit/{ref}", commit, methods=["POST"]),
]
