"""One git repository of the Hub: refs, reading at a revision, and atomic commits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dulwich.errors import NotGitRepository
from dulwich.objects import Blob, Commit, ObjectID, Tag, Tree
from dulwich.refs import Ref
from dulwich.repo import Repo

from ..errors import InvalidInput, RevisionNotFound, StaleParent
from ..names import is_oid, printable
from . import attributes
from .objects import ObjectBatch, ObjectCache
from .reader import Reader
from .refs import BRANCHES, PULLS, TAGS, Refs
from .tree_editor import TreeEditor

DEFAULT_BRANCH = "main"


@dataclass(frozen=True)
class AddFile:
    """Write the staged blob ``oid`` at ``path``; ``large`` if it is the pointer to a large file."""

    path: str
    oid: str
    large: bool = False


@dataclass(frozen=True)
class DeleteFile:
    path: str


@dataclass(frozen=True)
class DeleteFolder:
    path: str


Operation = AddFile | DeleteFile | DeleteFolder


class Repository(Reader):
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
        super().__init__(path, cache)
        self._refs = Refs(path, self._git)
        self._scratch = scratch
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
            RevisionNotFound: There is none.
        """
        if is_oid(revision):
            if isinstance(self._load_or_none(revision), Commit):
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
            Conflict: The branch exists or its name clashes with another's.
        """
        with self.exclusive():
            self._refs.create(BRANCHES, name, commit)

    def create_tag(self, name: str, commit: str, message: str, author: str) -> None:
        """Point a new tag at ``commit``: an annotated one when there is a message.

        Raises:
            Conflict: The tag exists or its name clashes with another's.
        """
        with self.exclusive(), self.batch() as batch:
            self._refs.check_new(TAGS, name)
            oid = batch.add(_tag_object(name, commit, message, author)) if message else commit
            batch.publish()
            self._refs.create(TAGS, name, oid)

    def delete_branch(self, name: str) -> None:
        """Remove a branch.

        Raises:
            RevisionNotFound: There is none.
            InvalidInput: It is the default branch.
        """
        if name == DEFAULT_BRANCH:
            raise InvalidInput(f"Cannot delete {BRANCHES}{name}: it is the default branch")
        self._delete_ref(BRANCHES + name, name)

    def delete_tag(self, name: str) -> None:
        """Remove a tag.

        Raises:
            RevisionNotFound: There is none.
        """
        self._delete_ref(TAGS + name, name)

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
            RevisionNotFound: There is no such branch.
            StaleParent: The branch is not at ``parent``.
            InvalidInput, EntryNotFound: An operation does not apply.
        """
        ref = branch if branch.startswith(PULLS) else BRANCHES + branch
        with self.exclusive():
            while True:
                head = self._refs.read(ref)
                if head is None:
                    raise self._no_revision(branch)
                if parent is not None and parent != head:
                    raise StaleParent(
                        "The branch was updated since you opened this page. Please refresh and try again. "
                        f"Branch {branch!r} is at {head}, not at the given parent commit {parent}: "
                        "a commit has happened since.",
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
            InvalidInput, EntryNotFound: An operation does not apply.
        """
        with self.exclusive():
            number = 1 + max((int(name) for name in self.pulls() if name.isdigit()), default=0)
            new = self._build([base], operations, batch, message, author)
            self._refs.create(PULLS, str(number), new)
            return number, new

    def _build(
        self, parents: list[str], operations: list[Operation], batch: ObjectBatch, message: str, author: str
    ) -> str:
        editor = TreeEditor(self._tree, self.commit_info(parents[0]).tree)
        for operation in operations:
            match operation:
                case AddFile(path, oid, _):
                    editor.put(path, oid)
                case DeleteFile(path):
                    editor.delete_file(path)
                case DeleteFolder(path):
                    editor.delete_folder(path)
        self._name_large_files(editor, parents[0], operations, batch)
        new = batch.add(_commit_object(editor.write(batch.add), parents, message, author))
        batch.publish()
        return new

    def _name_large_files(
        self, editor: TreeEditor, parent: str, operations: list[Operation], batch: ObjectBatch
    ) -> None:
        """Keep a line in ``.gitattributes`` for each large file, also where the caller writes that file."""
        entry = self.entry(parent, attributes.FILE)
        before = (
            attributes.patterns(self._attributes(entry.oid)) if entry is not None and entry.is_file else set()
        )
        now = set(before)
        for operation in operations:
            name = attributes.pattern(operation.path)
            if isinstance(operation, AddFile) and operation.large:
                now.add(name)
            else:
                # A file that is no large one any more, or everything below a folder that is gone.
                now = {other for other in now if other != name and not other.startswith(f"{name}/")}
        if before or now:
            oid = editor.file(attributes.FILE)
            text = "" if oid is None else self._attributes(oid, batch)
            new = attributes.with_patterns(text, before, now)
            if new != text:
                blob = Blob.from_string(new.encode("utf-8", "surrogateescape"))
                editor.put(attributes.FILE, batch.add(blob))

    def _attributes(self, oid: str, batch: ObjectBatch | None = None) -> str:
        staged = None if batch is None else batch.get(oid)
        data = self.head(oid, attributes.MAX_BYTES) if staged is None else staged.as_raw_string()
        return data.decode("utf-8", "surrogateescape")

    # Internals

    def _no_revision(self, revision: str) -> Exception:
        # Deleted under the request: then no revision is there, but that is not what the caller has to know.
        if not self.path.exists():
            return NotGitRepository(str(self.path))
        return RevisionNotFound(printable(revision))

    def _delete_ref(self, ref: str, name: str) -> None:
        with self.exclusive():
            if self._refs.read(ref) is None:
                raise self._no_revision(name)
            self._refs.delete(ref)


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


def _tag_object(name: str, commit: str, message: str, author: str) -> Tag:
    tag = Tag()
    tag.tagger = _identity(author)
    tag.message = message.encode("utf-8")
    tag.name = name.encode("utf-8")
    tag.object = (Commit, ObjectID(commit.encode("ascii")))
    tag.tag_time = int(time.time())
    tag.tag_timezone = 0
    return tag


def _identity(author: str) -> bytes:
    return f"{author} <{author}@users.noreply.invalid>".encode()
