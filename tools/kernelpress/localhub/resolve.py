"""Files over HTTP: ``/<repository>/resolve/<revision>/<path>`` and ``/raw/``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .context import decoded, hub_of
from .paths import file_path, printable
from .problems import Problem, entry_not_found
from .repository import Repository

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
# The part of a file that decides whether it is text, as git does.
_SAMPLE = 8000


def resolve(request: Request) -> Response:
    git = hub_of(request).readable(request).git
    revision, path = _split(request.path_params["rest"])
    commit = git.resolve(revision)
    oid = _file(git, commit, path)
    headers = {
        "ETag": f'"{oid}"',
        "X-Repo-Commit": commit,
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1], safe='')}",
    }
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
