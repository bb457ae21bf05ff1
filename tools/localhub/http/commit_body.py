"""The body of a commit request: one JSON object a line, a header and then operations."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import StorageError
from ..git.lfs_objects import LargeFile
from ..git.repository import AddFile, DeleteFile, DeleteFolder, Operation
from ..names import file_path, is_oid, new_file_path, printable
from .messages import Body, string
from .problems import Problem, as_problem, bad_request, too_large

MAX_FILE_BYTES = 64 << 20
MAX_BODY_BYTES = 512 << 20
# Base64 needs four bytes for three; the rest is for the path and the JSON around it.
MAX_LINE_BYTES = MAX_FILE_BYTES // 3 * 4 + (64 << 10)
_MAX_MESSAGE = 64 << 10


@dataclass(frozen=True)
class CommitRequest:
    """A parsed commit request.

    Args:
        message: Title, and after a blank line the description if there is one.
        parent: Commit the branch must be at, or None.
        operations: Changes, in the order given.
    """

    message: str
    parent: str | None
    operations: list[Operation]


def parse_commit(
    lines: Iterable[bytes], stage: Callable[[bytes], str], large: Callable[[str, str], LargeFile]
) -> CommitRequest:
    """Read a commit request line by line, handing each file's content to ``stage`` as it comes.

    Args:
        lines: The body's lines; none longer than ``MAX_LINE_BYTES``.
        stage: Keeps a file's content and returns its blob id.
        large: Finds a large file, given the path it is for and its digest.

    Raises:
        Problem: 4xx naming the line and its fault.
    """
    header: Body | None = None
    operations: list[Operation] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key, value = _parse_line(line)
            if key == "header":
                if header is not None:
                    raise bad_request("a second header")
                header = value
            elif header is None:
                raise bad_request("the first line must be the header")
            else:
                operations.append(_operation(key, value, stage, large))
        except (Problem, StorageError) as error:
            raise Problem(as_problem(error).status, f"commit line {number}: {error}") from error
    if header is None:
        raise bad_request("the commit is empty: its first line must be the header")
    return CommitRequest(_message(header), _parent(header), operations)


def _parse_line(line: bytes) -> tuple[str, Body]:
    if len(line) > MAX_LINE_BYTES:
        raise too_large(f"a file is larger than the {MAX_FILE_BYTES >> 20} MiB this Hub takes")
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        raise bad_request("not valid JSON") from None
    if not isinstance(item, dict) or not isinstance(item.get("key"), str):
        raise bad_request('expected {"key": ..., "value": {...}}')
    value = item.get("value")
    if not isinstance(value, dict):
        raise bad_request('"value" must be an object')
    return item["key"], value


def _operation(
    key: str, value: Body, stage: Callable[[bytes], str], large: Callable[[str, str], LargeFile]
) -> Operation:
    if key not in ("file", "deletedFile", "deletedFolder", "lfsFile"):
        raise bad_request(f"unknown operation {printable(key)!r}")
    path = string(value, "path")
    # The client marks folders by a trailing slash.
    check = new_file_path if key in ("file", "lfsFile") else file_path
    path = check(path.rstrip("/") if key == "deletedFolder" else path)
    match key:
        case "deletedFile":
            return DeleteFile(path)
        case "deletedFolder":
            return DeleteFolder(path)
        case "file":
            content = _content(path, value)
        case _:
            if value.get("algo", "sha256") != "sha256":
                raise bad_request(f"{printable(path)!r}: this Hub knows sha256 only")
            content = large(path, string(value, "oid")).pointer
    return AddFile(path, stage(content), large=key == "lfsFile")


def _content(path: str, value: Body) -> bytes:
    content = string(value, "content")
    encoding = value.get("encoding", "utf-8")
    if encoding not in ("base64", "utf-8"):
        raise bad_request(f"{printable(path)!r}: unknown encoding {printable(str(encoding))!r}; use 'base64'")
    try:
        data = base64.b64decode(content, validate=True) if encoding == "base64" else content.encode("utf-8")
    except ValueError:
        raise bad_request(f"{printable(path)!r}: the content is not valid {encoding}") from None
    if len(data) > MAX_FILE_BYTES:
        raise too_large(f"{printable(path)!r} is larger than the {MAX_FILE_BYTES >> 20} MiB this Hub takes")
    return data


def _message(header: Body) -> str:
    summary = string(header, "summary")
    description = header.get("description") or ""
    if not isinstance(description, str):
        raise bad_request('the header\'s "description" must be a string')
    if not summary.strip():
        raise bad_request('the header\'s "summary" must not be empty')
    message = f"{summary}\n\n{description}" if description else summary
    if len(message) > _MAX_MESSAGE:
        raise too_large(f"the commit message is longer than {_MAX_MESSAGE >> 10} KiB")
    try:
        message.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request("the commit message is not valid Unicode") from None
    if "\0" in message:
        raise bad_request("the commit message holds a NUL character")
    return message


def _parent(header: Body) -> str | None:
    parent = header.get("parentCommit")
    if parent is not None and not (isinstance(parent, str) and is_oid(parent)):
        raise bad_request('the header\'s "parentCommit" must be a full commit id')
    return parent
