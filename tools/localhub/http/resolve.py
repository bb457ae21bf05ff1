"""Routes of files: ``/<repository>/resolve/<revision>/<path>`` and ``/raw/``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ..git.lfs_objects import LargeFile
from ..git.repository import Repository
from ..names import file_path, printable
from .context import WEB_REPOS, hub_of
from .messages import decoded
from .problems import Problem, entry_not_found

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
# The part of a file that decides whether it is text, as git does.
_SAMPLE = 8000
_TEXT, _BINARY = "text/plain; charset=utf-8", "application/octet-stream"
# Pictures, by the bytes that they begin with; a browser runs nothing of these.
_PICTURES = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}


def resolve(request: Request) -> Response:
    git = hub_of(request).readable(request, content=True).git
    revision, path = _split(request.path_params["rest"])
    commit = git.resolve(revision)
    oid = _blob(git, commit, path)
    headers = {
        "X-Repo-Commit": commit,
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1], safe='')}",
    }
    large = git.large_file(oid)
    if large is not None:
        return large_response(request, git, large, headers)
    # Never a type that a browser would run: files here are untrusted input.
    head = git.head(oid, _SAMPLE)
    headers["Content-Type"] = _picture_type(head) or (_BINARY if b"\0" in head else _TEXT)
    return _response(request, oid, git.size(oid), headers, lambda start, stop: git.content(oid, start, stop))


def large_response(request: Request, git: Repository, file: LargeFile, headers: dict[str, str]) -> Response:
    """The content of a large file, or the range that was asked for, straight from the disk."""
    headers = headers | {
        "X-Linked-Etag": f'"{file.sha256}"',
        "X-Linked-Size": str(file.size),
        "Content-Type": _picture_type(b"".join(git.large.read(file, 0, min(file.size, 16)))) or _BINARY,
    }
    return _response(
        request, file.sha256, file.size, headers, lambda start, stop: git.large.read(file, start, stop)
    )


def _picture_type(head: bytes) -> str | None:
    return next((kind for kind, beginning in _PICTURES.items() if beginning.match(head)), None)


def _response(
    request: Request,
    tag: str,
    size: int,
    headers: dict[str, str],
    read: Callable[[int, int], bytes | Iterable[bytes]],
) -> Response:
    """Answer with content of ``size`` bytes that ``tag`` identifies, by RFC 9110's rules for ETags and ranges.

    Raises:
        Problem: 416 when the content is too short for the range.
    """
    headers = headers | {
        "ETag": f'"{tag}"',
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
    }
    if _matches(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    span = _requested_range(request, size, tag)
    start, stop = span or (0, size)
    headers["Content-Length"] = str(stop - start)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    if request.method == "HEAD":
        return Response(headers=headers)
    content = read(start, stop)
    status = 200 if span is None else 206
    if isinstance(content, bytes):
        return Response(content, status, headers)
    return StreamingResponse(content, status, headers)


def _split(rest: str) -> tuple[str, str]:
    """Revision and file path; a full ref (``refs/heads/x``) may be given with its slashes unencoded."""
    parts = rest.split("/")
    width = 3 if parts[0] == "refs" else 1
    if len(parts) <= width:
        raise entry_not_found("the address names no file")
    return decoded("/".join(parts[:width])), file_path(decoded("/".join(parts[width:])))


def _blob(git: Repository, commit: str, path: str) -> str:
    entry = git.entry(commit, path)
    if entry is None:
        raise entry_not_found(f"there is no file {printable(path)!r} at this revision")
    if not entry.is_file:
        kind = "a folder" if entry.is_folder else "a symbolic link or a submodule"
        raise entry_not_found(f"{printable(path)!r} is {kind}, not a file")
    return entry.oid


def _matches(header: str | None, tag: str) -> bool:
    if header is None:
        return False
    tags = [item.strip().removeprefix("W/") for item in header.split(",")]
    return "*" in tags or f'"{tag}"' in tags


def _requested_range(request: Request, size: int, tag: str) -> tuple[int, int] | None:
    """Start and end (exclusive) of the range asked for, or None for all of it.

    Raises:
        Problem: 416 when the content is too short for it.
    """
    header = request.headers.get("range")
    condition = request.headers.get("if-range")
    if header is None or request.method == "HEAD" or (condition is not None and condition != f'"{tag}"'):
        return None
    match = _RANGE.fullmatch(header.strip())
    # A form we do not serve (several ranges, another unit) may be ignored, says RFC 9110.
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= stop:
        raise Problem(416, f"the file has only {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return start, stop


routes = [Route(f"{repo}/{verb}/{{rest:path}}", resolve) for repo in WEB_REPOS for verb in ("resolve", "raw")]
