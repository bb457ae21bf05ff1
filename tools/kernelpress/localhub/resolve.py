"""Files over HTTP: ``/<repository>/resolve/<revision>/<path>`` and ``/raw/``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from .context import hub_of
from .large import LargeFile
from .messages import decoded
from .paths import file_path, printable
from .problems import Problem, entry_not_found
from .repository import Repository

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
# The part of a file that decides whether it is text, as git does.
_SAMPLE = 8000


def resolve(request: Request) -> Response:
    git = hub_of(request).readable(request, content=True).git
    revision, path = _split(request.path_params["rest"])
    commit = git.resolve(revision)
    oid = _file(git, commit, path)
    headers = {
        "X-Repo-Commit": commit,
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1], safe='')}",
    }
    large = git.large_file(oid)
    if large is not None:
        return large_response(request, git, large, headers)
    headers |= {"ETag": f'"{oid}"', "Accept-Ranges": "bytes", "X-Content-Type-Options": "nosniff"}
    if _matches(request.headers.get("if-none-match"), oid):
        return Response(status_code=304, headers=headers)
    data = git.read(oid)
    # Never a type that a browser would run: files here are untrusted input.
    headers["Content-Type"] = "text/plain; charset=utf-8" if _is_text(data) else "application/octet-stream"
    span = _requested_range(request, len(data), oid)
    if span is None:
        return Response(data, headers=headers)
    first, last = span
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Response(data[first : last + 1], status_code=206, headers=headers)


def large_response(request: Request, git: Repository, file: LargeFile, headers: dict[str, str]) -> Response:
    """The content of a large file, or what of it was asked for, straight from the disk."""
    headers = headers | {
        "ETag": f'"{file.sha256}"',
        "X-Linked-Etag": f'"{file.sha256}"',
        "X-Linked-Size": str(file.size),
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
        "Content-Type": "application/octet-stream",
    }
    if _matches(request.headers.get("if-none-match"), file.sha256):
        return Response(status_code=304, headers=headers)
    span = _requested_range(request, file.size, file.sha256)
    first, stop = (0, file.size) if span is None else (span[0], span[1] + 1)
    headers["Content-Length"] = str(stop - first)
    if span is not None:
        headers["Content-Range"] = f"bytes {first}-{stop - 1}/{file.size}"
    if request.method == "HEAD":
        return Response(headers=headers)
    pieces = git.large.read(file, first, stop)
    return StreamingResponse(pieces, status_code=200 if span is None else 206, headers=headers)


def _split(rest: str) -> tuple[str, str]:
    """Revision and file path; a full ref (``refs/heads/x``) may be given with its slashes unencoded."""
    parts = rest.split("/")
    width = 3 if parts[0] == "refs" else 1
    if len(parts) <= width:
        raise entry_not_found("the address names no file")
    return decoded("/".join(parts[:width])), file_path(decoded("/".join(parts[width:])))


def _file(git: Repository, commit: str, path: str) -> str:
    entry = git.entry(commit, path)
    if entry is None:
        raise entry_not_found(f"there is no file {printable(path)!r} at this revision")
    if not entry.is_file:
        what = "a folder" if entry.is_folder else "a symbolic link or a submodule"
        raise entry_not_found(f"{printable(path)!r} is {what}, not a file")
    return entry.oid


def _matches(header: str | None, oid: str) -> bool:
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or f'"{oid}"' in tags


def _is_text(data: bytes) -> bool:
    sample = data[:_SAMPLE]
    return b"\0" not in sample


def _requested_range(request: Request, size: int, oid: str) -> tuple[int, int] | None:
    """First and last byte asked for, or None for the whole file.

    Raises:
        Problem: 416 when the file is too short for it.
    """
    header = request.headers.get("range")
    condition = request.headers.get("if-range")
    if header is None or request.method == "HEAD" or (condition is not None and condition != f'"{oid}"'):
        return None
    match = _RANGE.fullmatch(header.strip())
    # A form we do not serve (several ranges, another unit) may be ignored, says RFC 9110.
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size - 1
    else:
        start, stop = int(first), min(int(last), size - 1) if last else size - 1
        if last and int(last) < start:
            return None
    if start > stop:
        raise Problem(416, f"the file has only {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return start, stop


def routes() -> Iterable[Route]:
    """The routes of this module."""
    for prefix in ("/{kind}", ""):
        for verb in ("resolve", "raw"):
            yield Route(f"{prefix}/{{namespace}}/{{name}}/{verb}/{{rest:path}}", resolve)
