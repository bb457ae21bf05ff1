"""The rules for names of repositories, branches and tags, and for paths of files.

Everything that later becomes part of a file-system path or a git tree passes through here first.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from dulwich.refs import Ref, check_ref_format

from .errors import InvalidInput

RepoKind = Literal["kernel", "model"]
KINDS: dict[str, RepoKind] = {"kernels": "kernel", "models": "model"}

MAX_PATH_BYTES = 1024
MAX_ELEMENT_BYTES = 255
MAX_DEPTH = 64

# These are first path segments of the Hub's own addresses, so a model of such a namespace would hide them.
RESERVED_NAMESPACES = frozenset({"api", "datasets", "healthz", "kernels", "lfs", "models", "spaces"})
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_OID = re.compile(r"[0-9a-f]{40}")
# Code points that HFS+ drops when it compares names, so that ".g<ZWNJ>it" is ".git" there.
_HFS_IGNORED = frozenset(
    chr(c) for first, last in ((0x200C, 0x200F), (0x202A, 0x202E), (0x206A, 0x206F), (0xFEFF, 0xFEFF))
    for c in range(first, last + 1)
)  # fmt: skip


@dataclass(frozen=True)
class RepoId:
    """A repository's type and name, checked.

    Args:
        kind: ``"kernel"`` or ``"model"``.
        namespace: User or organization.
        name: Name inside the namespace.
    """

    kind: RepoKind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def web_path(self) -> str:
        """Path of the repository below the Hub's address, without a leading slash."""
        return f"kernels/{self}" if self.kind == "kernel" else str(self)


def is_name(text: str) -> bool:
    """True if ``text`` can be a namespace or a repository's name (the Hub's rule)."""
    return (
        len(text) <= 96
        and _NAME.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
        and not text.lower().endswith((".git", ".ipynb"))
    )


def repo_id(kind: RepoKind, namespace: str, name: str) -> RepoId:
    """Check a repository's name.

    Raises:
        InvalidInput: Either part is not a name that the Hub allows.
    """
    for part in (namespace, name):
        if not is_name(part):
            raise InvalidInput(
                f"{printable(part)!r} is no valid name: use up to 96 letters, digits, '-', '_' and '.', "
                "not starting or ending with '-' or '.', without '--' or '..'"
            )
    if namespace.lower() in RESERVED_NAMESPACES:
        raise InvalidInput(f"{namespace!r} is reserved and cannot be a namespace")
    return RepoId(kind, namespace, name)


def is_oid(text: str) -> bool:
    """True if ``text`` is a full git object id."""
    return _OID.fullmatch(text) is not None


def ref_name(text: str, kind: str) -> str:
    """Check a new branch's or tag's short name; ``kind`` names it in the message.

    Raises:
        InvalidInput: Git would not take the name, or it could be mistaken for a commit id.
    """
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        raw = b""
    full = Ref(b"refs/heads/" + raw)
    usable = raw != b"" and len(raw) <= MAX_ELEMENT_BYTES and not raw.startswith((b"-", b"refs/"))
    if not usable or b"\x7f" in raw or raw == b"HEAD" or is_oid(text) or not check_ref_format(full):
        raise InvalidInput(f"{printable(text)!r} is no valid {kind} name")
    return text


def file_path(text: str) -> str:
    """Check the path of a file or folder inside a repository.

    Returns:
        The path, unchanged: ``/``-separated, relative, without empty, ``.`` or ``..`` elements.

    Raises:
        InvalidInput: The message names what is wrong with it.
    """
    reason = _path_fault(text)
    if reason is not None:
        raise InvalidInput(f"invalid path {printable(text)!r}: {reason}")
    return text


def new_file_path(text: str) -> str:
    """Check the path of a file that is added, which every client has to be able to download.

    Raises:
        InvalidInput: As ``file_path``, or a part of it begins like a drive of Windows, which the client refuses.
    """
    if any(element[1:2] == ":" for element in file_path(text).split("/")):
        raise InvalidInput(
            f"invalid path {printable(text)!r}: a part of it begins like a drive of Windows, and clients refuse to "
            "download the repository then"
        )
    return text


def printable(text: str) -> str:
    """``text`` cut short and free of characters that break a log line, a header or a JSON body."""
    short = text if len(text) <= 200 else text[:200] + "..."
    return "".join(c if c.isprintable() else "?" for c in short)


def _path_fault(text: str) -> str | None:
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if not raw:
        return "it is empty"
    if len(raw) > MAX_PATH_BYTES:
        return f"it is longer than {MAX_PATH_BYTES} bytes"
    if text.startswith("/"):
        return "it is absolute; paths start at the repository's root"
    if "\\" in text:
        return "it holds a backslash; separate folders with '/'"
    if any(unicodedata.category(c) == "Cc" for c in text):
        return "it holds a control character"
    elements = text.split("/")
    if len(elements) > MAX_DEPTH:
        return f"it is more than {MAX_DEPTH} folders deep"
    for element in elements:
        if element in ("", ".", ".."):
            return f"{element!r} is not allowed as a part of it"
        if len(element.encode("utf-8")) > MAX_ELEMENT_BYTES:
            return f"a part of it is longer than {MAX_ELEMENT_BYTES} bytes"
        if _is_dot_git(element):
            return f"{printable(element)!r} would be git's own directory in a checkout"
    return None


def _is_dot_git(element: str) -> bool:
    # A checkout may happen on a file system that ignores case, invisible characters, trailing dots and
    # spaces, or what follows a colon.
    plain = "".join(c for c in element if c not in _HFS_IGNORED).lower()
    return plain.split(":", 1)[0].rstrip(". ") in (".git", "git~1")
