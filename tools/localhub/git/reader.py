"""The reading half of a git repository: commits, trees and files, through a cache."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dulwich.errors import NotGitRepository, ObjectFormatException
from dulwich.objects import Blob, Commit, ObjectID, ShaFile, Tag, Tree
from dulwich.repo import Repo

from ..errors import Damaged, EntryNotFound
from ..names import MAX_DEPTH, printable
from .lfs_objects import MAX_POINTER, LargeFile, LargeFiles, parse_pointer
from .objects import ObjectCache, loose_blob_size, read_loose_blob
from .tree_editor import TreeEntry

# A blob above this size is sent piece by piece, and is not kept in the cache.
_MAX_WHOLE = 1 << 20


@dataclass(frozen=True)
class CommitInfo:
    """A commit as the API shows it.

    Args:
        oid: Its id.
        parents: Ids of its parents.
        tree: Id of its root tree.
        author: Name of the author.
        time: Seconds since the epoch.
        title: First line of the message.
        description: The rest of the message.
    """

    oid: str
    parents: tuple[str, ...]
    tree: str
    author: str
    time: int
    title: str
    description: str


@dataclass(frozen=True)
class PathInfo:
    """A file or folder at some revision.

    ``size`` is in bytes and None for folders; ``large`` is set for a file that git only points to.
    """

    path: str
    entry: TreeEntry
    size: int | None
    large: LargeFile | None = None


class Reader:
    """Reads the objects of a bare git repository; safe from any thread.

    Args:
        path: The bare repository.
        cache: Shared by all repositories of a Hub.

    Raises:
        NotGitRepository: When there is none at ``path``.
    """

    def __init__(self, path: Path, cache: ObjectCache) -> None:
        self.path = path
        self.large = LargeFiles(path / "lfs")
        self._git = Repo(str(path))
        self._cache = cache
        # Part of every cache key: a repository deleted and made anew must not see its predecessor's objects.
        self._identity = object()
        self._reading = threading.Lock()

    def commit_info(self, oid: str) -> CommitInfo:
        """Describe the commit ``oid``, which must exist."""
        commit = self._load(oid)
        if not isinstance(commit, Commit):
            raise Damaged(oid, "is no commit")
        title, _, description = commit.message.decode("utf-8", "replace").partition("\n")
        return CommitInfo(
            oid=oid,
            parents=tuple(parent.decode("ascii") for parent in commit.parents),
            tree=commit.tree.decode("ascii"),
            author=commit.author.decode("utf-8", "replace").split(" <")[0],
            time=commit.commit_time,
            title=title,
            description=description.strip("\n"),
        )

    def history(self, oid: str) -> Iterator[CommitInfo]:
        """The commit ``oid`` and its first parents, newest first."""
        next_oid: str | None = oid
        while next_oid is not None:
            info = self.commit_info(next_oid)
            yield info
            next_oid = info.parents[0] if info.parents else None

    def entry(self, commit: str, path: str) -> TreeEntry | None:
        """The tree entry at ``path`` in ``commit``, or None; the root's path is empty."""
        entry: TreeEntry | None = TreeEntry(0o040000, self.commit_info(commit).tree)
        for name in path.split("/") if path else ():
            if entry is None or not entry.is_folder:
                return None
            entry = self._tree(entry.oid).get(name)
        return entry

    def path_info(self, commit: str, path: str) -> PathInfo | None:
        """Like ``entry``, with the size of a file."""
        entry = self.entry(commit, path)
        return None if entry is None else self._path_info(path, entry)

    def walk(self, commit: str, path: str = "", *, recursive: bool) -> Iterator[tuple[str, TreeEntry]]:
        """Paths and entries below the folder at ``path``, in git's order.

        Raises:
            EntryNotFound: There is no such folder; raised at once.
        """
        folder = self.entry(commit, path)
        if folder is None or not folder.is_folder:
            raise EntryNotFound(f"there is no folder {printable(path)!r} at this revision")
        return self._walk(folder, f"{path}/" if path else "", recursive)

    def files(self, commit: str) -> dict[str, TreeEntry]:
        """Everything in ``commit`` but folders, by path."""
        return {path: entry for path, entry in self.walk(commit, recursive=True) if not entry.is_folder}

    def describe(self, entries: Iterable[tuple[str, TreeEntry]]) -> list[PathInfo]:
        """Add sizes to paths and entries."""
        return [self._path_info(path, entry) for path, entry in entries]

    def read(self, oid: str) -> bytes:
        """Content of the blob ``oid``, which must exist."""
        key = (self._identity, oid)
        data = self._cache.get(key)
        if data is None:
            blob = self._object(oid)
            if not isinstance(blob, Blob):
                raise Damaged(oid, "is no file")
            data = blob.data
            self._cache.put(key, data, len(data))
        return cast(bytes, data)

    def size(self, oid: str) -> int:
        """Size in bytes of the blob ``oid``, which must exist."""
        key = (self._identity, oid, "size")
        size = cast("int | None", self._cache.get(key))
        if size is None:
            size = loose_blob_size(self._loose(oid))
            if size is None:
                size = len(self.read(oid))
            self._cache.put(key, size, 0)
        return size

    def content(self, oid: str, start: int, stop: int) -> bytes | Iterator[bytes]:
        """Bytes ``start`` to ``stop`` (exclusive) of the blob ``oid``; in pieces if it is large and in no pack."""
        loose = self._loose(oid)
        if self.size(oid) > _MAX_WHOLE and loose.exists():
            return read_loose_blob(loose, start, stop)
        return self.read(oid)[start:stop]

    def head(self, oid: str, length: int) -> bytes:
        """The first ``length`` bytes of the blob ``oid``, or all if it has fewer."""
        content = self.content(oid, 0, length)
        return content if isinstance(content, bytes) else b"".join(content)

    def large_file(self, oid: str, size: int | None = None) -> LargeFile | None:
        """The large file that the blob ``oid`` (of ``size`` bytes, where that is known) points to, if it does."""
        size = self.size(oid) if size is None else size
        file = parse_pointer(self.read(oid)) if 0 < size <= MAX_POINTER else None
        # Text that looks like a pointer, and whose object nobody uploaded here, is just a file.
        return file if file is not None and self.large.has(file) else None

    def last_commits(self, commit: str, paths: list[str]) -> dict[str, CommitInfo]:
        """For each path in ``commit``, the newest commit (following first parents) that changed it."""
        pending = {path: self.entry(commit, path) for path in paths}
        last: dict[str, CommitInfo] = {}
        for info in self.history(commit):
            parent = info.parents[0] if info.parents else None
            for path, entry in list(pending.items()):
                if parent is None or self.entry(parent, path) != entry:
                    last[path] = info
                    del pending[path]
            if not pending:
                break
        return last

    # Internals

    def _walk(self, folder: TreeEntry, prefix: str, recursive: bool) -> Iterator[tuple[str, TreeEntry]]:
        if prefix.count("/") > MAX_DEPTH:
            raise Damaged(folder.oid, f"is more than {MAX_DEPTH} folders deep")
        for name, entry in self._tree(folder.oid).items():
            yield prefix + name, entry
            if recursive and entry.is_folder:
                yield from self._walk(entry, f"{prefix}{name}/", recursive)

    def _path_info(self, path: str, entry: TreeEntry) -> PathInfo:
        if entry.is_folder:
            return PathInfo(path, entry, None)
        try:
            size = self.size(entry.oid)
        except Damaged:
            # A submodule's commit lives in another repository.
            size = 0
        large = self.large_file(entry.oid, size)
        return PathInfo(path, entry, size if large is None else large.size, large)

    def _peel(self, oid: str) -> str:
        while isinstance(tag := self._load_or_none(oid), Tag):
            oid = tag.object[1].decode("ascii")
        return oid

    def _tree(self, oid: str) -> Mapping[str, TreeEntry]:
        tree = self._load(oid)
        if not isinstance(tree, dict):
            raise Damaged(oid, "is no folder")
        return tree

    def _load_or_none(self, oid: str) -> object | None:
        try:
            return self._load(oid)
        except Damaged:
            return None

    def _load(self, oid: str) -> object:
        """An object; a commit or a parsed tree comes through the cache."""
        key = (self._identity, oid)
        value = self._cache.get(key)
        if value is None:
            value = obj = self._object(oid)
            if isinstance(obj, Tree):
                try:
                    value = {
                        item.path.decode("utf-8", "surrogateescape"): TreeEntry(
                            item.mode, item.sha.decode("ascii")
                        )
                        for item in obj.iteritems()
                    }
                except (ObjectFormatException, ValueError) as error:
                    raise Damaged(oid, "cannot be read") from error
            if isinstance(obj, Commit | Tree):
                self._cache.put(key, value, 4 * obj.raw_length())
        return value

    def _loose(self, oid: str) -> Path:
        return self.path / "objects" / oid[:2] / oid[2:]

    def _object(self, oid: str) -> ShaFile:
        try:
            # dulwich's object store keeps unguarded state (its list of packs).
            with self._reading:
                return cast(ShaFile, self._git.object_store[ObjectID(oid.encode("ascii"))])
        except KeyError:
            if not self.path.exists():
                # Deleted under a request that was reading it.
                raise NotGitRepository(str(self.path)) from None
            raise Damaged(oid, "is missing") from None
        except (ObjectFormatException, zlib.error, AssertionError, ValueError) as error:
            raise Damaged(oid, "cannot be read") from error
