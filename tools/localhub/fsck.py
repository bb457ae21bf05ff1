"""Examine a Hub: every object that a ref leads to, every large file, every setting."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dulwich.errors import NotGitRepository
from dulwich.objects import Blob, Commit, ObjectID, ShaFile, Tag, Tree
from dulwich.repo import Repo

from .errors import HubError
from .git.lfs_objects import MAX_POINTER, LargeFiles, parse_pointer, sha256_of
from .names import MAX_DEPTH
from .store import Settings
from .tokens import Tokens

_SUBMODULE = 0o160000


@dataclass(frozen=True)
class FsckReport:
    """Counts of what was read, and every fault; ``faults`` is empty if all is well."""

    repositories: int
    objects: int
    large_files: int
    faults: tuple[str, ...]


def fsck(root: Path) -> FsckReport:
    """Read all of a Hub and compare it with its own names and digests; changes nothing.

    Safe while the Hub runs: what it adds in the meantime is whole.

    Raises:
        HubError: There is no Hub at ``root``.
    """
    repositories = repositories_below(root)
    faults: list[str] = []
    try:
        Tokens(root)
    except HubError as error:
        faults.append(str(error))
    objects = large = 0
    for name, folder in repositories:
        reachable = examine(folder)
        objects += len(reachable.objects)
        faults += [f"{name}: {fault}" for fault in reachable.faults]
        for digest, path in LargeFiles(folder / "lfs").all():
            large += 1
            with path.open("rb") as source:
                if sha256_of(source) != digest:
                    faults.append(f"{name}: large file {digest} has other content")
    return FsckReport(len(repositories), objects, large, tuple(faults))


@dataclass(frozen=True)
class ReachableObjects:
    """Ids of objects and digests of large files that a repository's refs lead to, and the faults found on the way."""

    objects: frozenset[bytes]
    large_files: frozenset[str]
    faults: tuple[str, ...]


def repositories_below(root: Path) -> list[tuple[str, Path]]:
    """The kind and id, and the directory, of every repository of a Hub.

    Raises:
        HubError: There is no Hub at ``root``.
    """
    base = root / "repos"
    if not base.is_dir():
        raise HubError("there is no Hub here; name its directory with --root", path=root)
    return [
        (folder.relative_to(base).as_posix().removesuffix(".git"), folder)
        for folder in sorted(base.glob("*/*/*.git"))
    ]


def examine(folder: Path) -> ReachableObjects:
    """Read everything of a repository that its branches, tags and pull requests lead to, and its settings."""
    faults: list[str] = []
    try:
        Settings(**json.loads((folder / "hub.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        faults.append(f"its settings cannot be read: {error}")
    try:
        git = Repo(str(folder))
    except NotGitRepository:
        return ReachableObjects(frozenset(), frozenset(), (*faults, "it is no git repository"))
    large = LargeFiles(folder / "lfs")
    with git:
        seen: dict[bytes, type[ShaFile] | None] = {}
        digests: set[str] = set()
        refs = git.get_refs()
        for ref, oid in sorted(refs.items()):
            name = ref.decode("utf-8", "replace")
            faults += [f"{name}: {fault}" for fault in _walk(git, oid, seen, digests, large)]
        if b"refs/heads/main" not in refs:
            faults.append("it has no branch main")
    return ReachableObjects(frozenset(seen), frozenset(digests), tuple(faults))


def _walk(
    git: Repo, start: bytes, seen: dict[bytes, type[ShaFile] | None], digests: set[str], large: LargeFiles
) -> Iterator[str]:
    """Faults of everything that an object leads to and that is not in ``seen`` yet; fills ``seen`` and ``digests``."""
    # Each with what it has to be, if that is known, and how deep it is.
    pending: list[tuple[bytes, type[ShaFile] | None, int]] = [(start, None, 0)]
    while pending:
        oid, needed, depth = pending.pop()
        if oid in seen:
            if needed is not None and seen[oid] not in (None, needed):
                yield _is_another(oid, needed)
            continue
        seen[oid] = None
        name = oid.decode("ascii", "replace")
        try:
            obj = git.object_store[ObjectID(oid)]
            # Its name says what was written; this hashes what is there now.
            if type(obj).from_string(obj.as_raw_string()).id != oid:
                yield f"object {name} has other content"
                continue
        except KeyError:
            yield f"object {name} is missing"
            continue
        # Damaged data fails in as many ways as there are layers that read it; zlib's error is a bare Exception.
        except Exception as error:  # noqa: BLE001
            yield f"object {name} is damaged: {error}"
            continue
        seen[oid] = type(obj)
        if needed is not None and not isinstance(obj, needed):
            yield _is_another(oid, needed)
        elif isinstance(obj, Commit):
            pending += [(obj.tree, Tree, 0), *((parent, Commit, 0) for parent in obj.parents)]
        elif isinstance(obj, Tree):
            if depth == MAX_DEPTH:
                yield f"folder {name} is more than {MAX_DEPTH} folders deep"
            for item in obj.iteritems():
                if not _is_utf8(item.path):
                    yield f"folder {name} holds a name that is not UTF-8: {item.path!r}"
                if item.mode != _SUBMODULE:
                    pending.append((item.sha, Tree if stat.S_ISDIR(item.mode) else Blob, depth + 1))
        elif isinstance(obj, Tag):
            pending.append((obj.object[1], obj.object[0], 0))
        elif isinstance(obj, Blob) and obj.raw_length() <= MAX_POINTER:
            file = parse_pointer(obj.data)
            if file is None:
                continue
            digests.add(file.sha256)
            size = large.size(file.sha256)
            if size is not None and size != file.size:
                yield f"large file {file.sha256} has {size} bytes instead of {file.size}"


def _is_another(oid: bytes, needed: type[ShaFile]) -> str:
    return f"object {oid.decode('ascii', 'replace')} is no {needed.type_name.decode('ascii')}"


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
