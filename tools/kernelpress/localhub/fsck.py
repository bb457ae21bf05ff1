"""Whether all that a Hub keeps is whole: every object that a ref leads to, every large file, every setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dulwich.errors import NotGitRepository, ObjectFormatException
from dulwich.objects import Blob, Commit, ObjectID, Tag, Tree
from dulwich.repo import Repo

from kernelpress.errors import HubError

from .large import MAX_POINTER, LargeFiles, parse_pointer
from .store import Settings
from .tokens import Tokens

_CHUNK = 1 << 20
_SUBMODULE = 0o160000


@dataclass(frozen=True)
class Checked:
    """What was looked at, and what is wrong; ``faults`` is empty if all is well."""

    repositories: int
    objects: int
    large_files: int
    faults: tuple[str, ...]


def fsck(root: Path) -> Checked:
    """Read all of a Hub and compare it with its own names and digests; changes nothing.

    Safe while the Hub runs: what it adds in the meantime is whole.

    Raises:
        HubError: There is no Hub at ``root``.
    """
    if not (root / "repos").is_dir():
        raise HubError("there is no Hub here; name its directory with --root", path=root)
    faults: list[str] = []
    try:
        Tokens(root)
    except HubError as error:
        faults.append(str(error))
    repositories = objects = large = 0
    for name, place in repositories_below(root):
        repositories += 1
        reached = examine(place)
        found = list(reached.faults)
        objects += len(reached.objects)
        files = LargeFiles(place / "lfs")
        for digest, path in files.all():
            large += 1
            if _digest(path) != digest:
                found.append(f"large file {digest} has other content")
        faults += [f"{name}: {fault}" for fault in found]
    return Checked(repositories, objects, large, tuple(faults))


@dataclass(frozen=True)
class Reached:
    """What the refs of a repository lead to: ids of objects, digests of large files; and what is wrong with it."""

    objects: frozenset[bytes]
    large_files: frozenset[str]
    faults: tuple[str, ...]


def repositories_below(root: Path) -> Iterator[tuple[str, Path]]:
    """Every repository of a Hub: its kind and id, and its directory."""
    for place in sorted((root / "repos").glob("*/*/*.git")):
        yield place.relative_to(root / "repos").as_posix().removesuffix(".git"), place


def examine(place: Path) -> Reached:
    """Read everything of a repository that its branches, tags and pull requests lead to, and its settings."""
    faults: list[str] = []
    try:
        Settings(**json.loads((place / "hub.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        faults.append(f"its settings cannot be read: {error}")
    try:
        git = Repo(str(place))
    except NotGitRepository:
        return Reached(frozenset(), frozenset(), (*faults, "it is no git repository"))
    with git:
        seen: set[bytes] = set()
        large: set[str] = set()
        for ref, oid in sorted(git.get_refs().items()):
            shown = ref.decode("utf-8", "replace")
            faults += [
                f"{shown}: {fault}" for fault in _walk(git, oid, seen, large, LargeFiles(place / "lfs"))
            ]
        if b"refs/heads/main" not in git.get_refs():
            faults.append("it has no branch main")
    return Reached(frozenset(seen), frozenset(large), tuple(faults))


def _walk(git: Repo, start: bytes, seen: set[bytes], named: set[str], large: LargeFiles) -> Iterator[str]:
    """Faults of everything that an object leads to."""
    pending = [start]
    while pending:
        oid = pending.pop()
        if oid in seen:
            continue
        seen.add(oid)
        shown = oid.decode("ascii", "replace")
        try:
            obj = git.object_store[ObjectID(oid)]
            # What the object is called is what it was written as; this is what it holds now.
            if type(obj).from_string(obj.as_raw_string()).id != oid:
                yield f"object {shown} has other content"
                continue
        except KeyError:
            yield f"object {shown} is missing"
            continue
        # Damaged data fails in as many ways as there are layers that read it.
        except (ObjectFormatException, OSError, ValueError, AssertionError, ArithmeticError) as error:
            yield f"object {shown} cannot be read: {error}"
            continue
        except Exception as error:  # noqa: BLE001 - zlib's error, among others, is a bare Exception
            yield f"object {shown} is damaged: {error}"
            continue
        if isinstance(obj, Commit):
            pending += [obj.tree, *obj.parents]
        elif isinstance(obj, Tree):
            pending += [item.sha for item in obj.iteritems() if item.mode != _SUBMODULE]
        elif isinstance(obj, Tag):
            pending.append(obj.object[1])
        elif isinstance(obj, Blob) and obj.raw_length() <= MAX_POINTER:
            file = parse_pointer(obj.data)
            if file is None:
                continue
            named.add(file.sha256)
            size = large.size(file.sha256)
            if size is not None and size != file.size:
                yield f"large file {file.sha256} has {size} bytes instead of {file.size}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
