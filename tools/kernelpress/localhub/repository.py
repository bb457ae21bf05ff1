"""One git repository of the Hub: refs, reading at a revision, and atomic commits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dulwich.errors import NotGitRepository
from dulwich.objects import Blob, Commit, ObjectID, ShaFile, Tag, Tree
from dulwich.refs import Ref
from dulwich.repo import Repo

from .large import MAX_POINTER, LargeFile, LargeFiles, parse_pointer
from .objects import ObjectBatch, ObjectCache
from .paths import is_oid, printable
from .problems import Problem, bad_request, revision_not_found
from .refs import BRANCHES, PULLS, TAGS, Refs
from .trees import TreeEditor, TreeEntry

DEFAULT_BRANCH = "main"


@dataclass(frozen=True)
class AddFile:
    """Write the staged blob ``oid`` at ``path``."""

    path: str
    oid: str


@dataclass(frozen=True)
class DeleteFile:
    path: str


@dataclass(frozen=True)
class DeleteFolder:
    path: str


Operation = AddFile | DeleteFile | DeleteFolder


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


class Repository:
    """A bare git repository.

    Reading is safe from any thread. Writers inside this process queue up on a lock; against writers outside
    of it (a ``git push`` on the server's disk) refs are moved by compare-and-swap.

    Args:
        path: The bare repository.
        cache: Shared by all repositories of a Hub.
        scratch: Directory on the same file system for files in the making.

    Raises:
        NotGitRepository: When there is none at ``path``.
    """

    def __init__(self, path: Path, cache: ObjectCache, scratch: Path) -> None:
        self.path = path
        self._git = Repo(str(path))
        self._refs = Refs(path, self._git)
        self.large = LargeFiles(path / "lfs")
        self._cache = cache
        self._scratch = scratch
        # Part of every cache key: a repository deleted and made anew must not see its predecessor's objects.
        self._identity = object()
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._retired = False

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep all other writers of this process out.

        Raises:
            NotGitRepository: The repository has been deleted.
        """
        with self._writing:
            if self._retired:
                raise NotGitRepository(str(self.path))
            yield

    def retire(self) -> None:
        """Let no writer in any more: the repository is being deleted. Call it inside ``exclusive``."""
        self._retired = True

    # Refs

    def branches(self) -> dict[str, str]:
        """Branch names and the commits they point to, sorted by name."""
        return self._refs.under(BRANCHES)

    def tags(self) -> dict[str, str]:
        """Tag names and the commits they lead to, sorted by name."""
        return {name: self._peel(oid) for name, oid in self._refs.under(TAGS).items()}

    def pulls(self) -> dict[str, str]:
        """Numbers of pull requests and the commits they are at."""
        return self._refs.under(PULLS)

    def resolve(self, revision: str) -> str:
        """The commit id for a branch, a tag, a full ref or a full commit id.

        Raises:
            Problem: 404 ``RevisionNotFound``.
        """
        if is_oid(revision):
            if isinstance(self._object_or_none(revision), Commit):
                return revision
            raise self._no_revision(revision)
        full = revision.startswith((BRANCHES, TAGS, PULLS))
        for ref in (revision,) if full else (BRANCHES + revision, TAGS + revision):
            oid = self._refs.read(ref)
            if oid is not None:
                return self._peel(oid)
        raise self._no_revision(revision)

    def create_branch(self, name: str, commit: str) -> None:
        """Point a new branch at ``commit``.

        Raises:
            Problem: 409 when the branch exists or its name clashes with another's.
        """
        self._create_ref(BRANCHES, name, commit, "branch")

    def create_tag(self, name: str, commit: str, message: str, author: str) -> None:
        """Point a new tag at ``commit``: an annotated one when there is a message.

        Raises:
            Problem: 409 when the tag exists or its name clashes with another's.
        """
        if not message:
            self._create_ref(TAGS, name, commit, "tag")
            return
        tag = Tag()
        tag.tagger = _identity(author)
        tag.message = message.encode("utf-8")
        tag.name = name.encode("utf-8")
        tag.object = (Commit, ObjectID(commit.encode("ascii")))
        tag.tag_time = int(time.time())
        tag.tag_timezone = 0
        with self.batch() as batch:
            self._create_ref(TAGS, name, batch.add(tag), "tag", batch)

    def delete_branch(self, name: str) -> None:
        """Remove a branch.

        Raises:
            Problem: 404 when there is none, 400 when it is the default branch.
        """
        if name == DEFAULT_BRANCH:
            raise bad_request(f"the default branch {name!r} cannot be deleted")
        self._delete_ref(BRANCHES + name, name)

    def delete_tag(self, name: str) -> None:
        """Remove a tag.

        Raises:
            Problem: 404 when there is none.
        """
        self._delete_ref(TAGS + name, name)

    # Reading

    def commit_info(self, oid: str) -> CommitInfo:
        """Describe the commit ``oid``, which must exist."""
        commit = self._load(oid)
        assert isinstance(commit, Commit)
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
        """What stands at ``path`` in ``commit``, or None."""
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

    def walk(self, folder: TreeEntry, path: str, recursive: bool) -> Iterator[tuple[str, TreeEntry]]:
        """The entries below ``folder``, which stands at ``path``, in git's order."""
        for name, entry in self._tree(folder.oid).items():
            below = f"{path}/{name}" if path else name
            yield below, entry
            if recursive and entry.is_folder:
                yield from self.walk(entry, below, recursive)

    def describe(self, found: list[tuple[str, TreeEntry]]) -> list[PathInfo]:
        """Add sizes to what ``walk`` found."""
        return [self._path_info(path, entry) for path, entry in found]

    def read(self, oid: str) -> bytes:
        """Content of the blob ``oid``, which must exist."""
        key = (self._identity, oid)
        data = self._cache.get(key)
        if data is None:
            blob = self._object(oid)
            assert isinstance(blob, Blob)
            data = blob.data
            self._cache.put(key, data, len(data))
            self._cache.put((self._identity, oid, "size"), len(data), 0)
        return cast(bytes, data)

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

    # Writing

    def batch(self) -> ObjectBatch:
        """A place to stage blobs for ``commit``; use it as a context manager."""
        return ObjectBatch(self.path / "objects", self._scratch)

    def commit(
        self,
        branch: str,
        operations: list[Operation],
        *,
        batch: ObjectBatch,
        message: str,
        author: str,
        parent: str | None = None,
        merged: str | None = None,
    ) -> str:
        """Apply ``operations`` in order as one commit on ``branch``.

        Readers see the old commit or the new one, whatever happens: all objects are on stable storage
        before the branch moves, and it moves only from the commit that the new one was built on.

        Args:
            branch: An existing branch, or a pull request as ``refs/pr/<number>``.
            operations: Changes; the blobs of additions are staged in ``batch``.
            batch: Staged blobs; trees and the commit join them.
            message: Commit message.
            author: Author's name.
            parent: The commit the branch must be at, if the caller insists.
            merged: A second parent.

        Returns:
            The new commit's id.

        Raises:
            Problem: 404 ``RevisionNotFound`` for an unknown branch, 412 when the branch is not at
                ``parent``, 400 or 404 when an operation does not apply.
        """
        ref = branch if branch.startswith(PULLS) else BRANCHES + branch
        with self.exclusive():
            while True:
                head = self._refs.read(ref)
                if head is None:
                    raise self._no_revision(branch)
                if parent is not None and parent != head:
                    raise Problem(
                        412,
                        f"branch {branch!r} is at {head}, not at the given parent commit {parent}: "
                        "a commit has happened since. Refresh and try again.",
                    )
                parents = [head] if merged is None else [head, merged]
                new = self._build(parents, operations, batch, message, author)
                if self._refs.swap(ref, head, new):
                    return new

    def open_pull(
        self, base: str, operations: list[Operation], *, batch: ObjectBatch, message: str, author: str
    ) -> tuple[int, str]:
        """Make a commit on ``base`` that no branch points to but a new pull request.

        Returns:
            The pull request's number and the commit.

        Raises:
            Problem: 400 or 404 when an operation does not apply.
        """
        with self.exclusive():
            number = 1 + max((int(name) for name in self.pulls() if name.isdigit()), default=0)
            new = self._build([base], operations, batch, message, author)
            self._refs.create(PULLS, str(number), new, "pull request")
            return number, new

    def _build(
        self, parents: list[str], operations: list[Operation], batch: ObjectBatch, message: str, author: str
    ) -> str:
        editor = TreeEditor(self._tree, self.commit_info(parents[0]).tree)
        for operation in operations:
            match operation:
                case AddFile(path, oid):
                    editor.put(path, oid)
                case DeleteFile(path):
                    editor.delete_file(path)
                case DeleteFolder(path):
                    editor.delete_folder(path)
        new = batch.add(_commit_object(editor.write(batch.add), parents, message, author))
        batch.publish()
        return new

    # Internals

    def _no_revision(self, revision: str) -> Exception:
        # Deleted under the request: then no revision is there, but that is not what the caller has to know.
        if not self.path.exists():
            return NotGitRepository(str(self.path))
        return revision_not_found(printable(revision))

    def _create_ref(
        self, base: str, name: str, oid: str, what: str, batch: ObjectBatch | None = None
    ) -> None:
        with self.exclusive():
            self._refs.check_new(base, name, what)
            if batch is not None:
                batch.publish()
            self._refs.create(base, name, oid, what)

    def _delete_ref(self, ref: str, name: str) -> None:
        with self.exclusive():
            if self._refs.read(ref) is None:
                raise self._no_revision(name)
            self._refs.delete(ref)

    def _peel(self, oid: str) -> str:
        obj = self._object_or_none(oid)
        while isinstance(obj, Tag):
            oid = obj.object[1].decode("ascii")
            obj = self._object_or_none(oid)
        return oid

    def _tree(self, oid: str) -> Mapping[str, TreeEntry]:
        tree = self._load(oid)
        return cast(Mapping[str, TreeEntry], tree)

    def _load(self, oid: str) -> object:
        """A commit or a parsed tree, through the cache."""
        key = (self._identity, oid)
        value = self._cache.get(key)
        if value is None:
            obj = self._object(oid)
            value = obj
            if isinstance(obj, Tree):
                value = {
                    item.path.decode("utf-8", "surrogateescape"): TreeEntry(
                        item.mode, item.sha.decode("ascii")
                    )
                    for item in obj.iteritems()
                }
            self._cache.put(key, value, 4 * obj.raw_length())
        return value

    def _object(self, oid: str) -> ShaFile:
        try:
            # dulwich's object store keeps unguarded state (its list of packs).
            with self._reading:
                return cast(ShaFile, self._git.object_store[ObjectID(oid.encode("ascii"))])
        except KeyError:
            if not self.path.exists():
                # Deleted under a request that was reading it.
                raise NotGitRepository(str(self.path)) from None
            raise

    def _object_or_none(self, oid: str) -> object | None:
        value = self._cache.get((self._identity, oid))
        if value is None:
            try:
                value = self._object(oid)
            except KeyError:
                return None
            if isinstance(value, Commit):
                self._cache.put((self._identity, oid), value, 4 * value.raw_length())
        return value

    def _path_info(self, path: str, entry: TreeEntry) -> PathInfo:
        if entry.is_folder:
            return PathInfo(path, entry, None)
        key = (self._identity, entry.oid, "size")
        size = self._cache.get(key)
        if size is None:
            try:
                size = len(self.read(entry.oid))
            except KeyError:
                # A submodule's commit lives in another repository.
                size = 0
            self._cache.put(key, size, 0)
        large = self.large_file(entry.oid, cast(int, size))
        return PathInfo(path, entry, cast(int, size) if large is None else large.size, large)

    def large_file(self, oid: str, size: int | None = None) -> LargeFile | None:
        """The large file that the blob ``oid`` (of ``size`` bytes, where that is known) points to, if it does."""
        if size is not None and size > MAX_POINTER:
            return None
        data = self.read(oid) if size != 0 else b""
        found = parse_pointer(data) if len(data) <= MAX_POINTER else None
        # Text that looks like a pointer, and whose object nobody uploaded here, is just a file.
        return found if found is not None and self.large.has(found) else None


def write_initial_commit(git: Repo, files: dict[str, bytes], author: str, scratch: Path) -> None:
    """Give a new repository its default branch with one commit of top-level ``files``."""
    with ObjectBatch(Path(git.path) / "objects", scratch) as batch:
        tree = Tree()
        for name, data in files.items():
            tree.add(name.encode("utf-8"), 0o100644, ObjectID(batch.add(Blob.from_string(data)).encode()))
        commit = batch.add(_commit_object(batch.add(tree), [], "initial commit", author))
        batch.publish()
    git.refs.add_if_new(Ref(f"{BRANCHES}{DEFAULT_BRANCH}".encode()), ObjectID(commit.encode()))


def _commit_object(tree: str, parents: list[str], message: str, author: str) -> Commit:
    commit = Commit()
    commit.tree = ObjectID(tree.encode("ascii"))
    commit.parents = [ObjectID(parent.encode("ascii")) for parent in parents]
    commit.author = commit.committer = _identity(author)
    commit.author_time = commit.commit_time = int(time.time())
    commit.author_timezone = commit.commit_timezone = 0
    commit.encoding = b"UTF-8"
    commit.message = message.encode("utf-8")
    return commit


def _identity(author: str) -> bytes:
    return f"{author} <{author}@users.noreply.invalid>".encode()
