"""The Hub's root directory: its repositories and their settings.

    <root>/repos/<kind>s/<namespace>/<name>.git    bare repositories, settings in <name>.git/hub.json
    <root>/tmp/                                    things in the making; emptied at every start

A repository appears and disappears by one rename, so a crash leaves it whole or absent.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dulwich.errors import NotGitRepository
from dulwich.repo import Repo

from .errors import Conflict, HubError
from .git import attributes
from .git.lfs_objects import LargeFiles
from .git.objects import ObjectCache, replace_durably, sync
from .git.repository import DEFAULT_BRANCH, Repository, write_initial_commit
from .names import KINDS, RepoId, RepoKind, is_name

_SETTINGS = "hub.json"
# The Hub starts every repository with this file. Ours marks nothing yet.
_INITIAL_FILES = {attributes.FILE: b"# Each large file has a line here; all others are in git itself.\n"}


@dataclass(frozen=True)
class Settings:
    """The properties of a repository that are not in git.

    Args:
        private: Visible only with a token.
        created: Seconds since the epoch.
        gated: The token that reading its content takes: any (``"auto"``), or one of its organization (``"manual"``).
        former: Ids under which it was known before it was moved, ``namespace/name``, oldest first.
    """

    private: bool
    created: int
    gated: str | None = None
    former: tuple[str, ...] = ()


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Be the one process that writes below a Hub's root.

    Raises:
        HubError: Another one is, or the root cannot be used.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = open(root / "hub.lock", "a+", encoding="ascii")  # noqa: SIM115
    except OSError as error:
        raise HubError(f"cannot use it as the Hub's root: {error.strerror}", path=root) from error
    with file:
        try:
            # The kernel drops this lock with the process, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip() or "unknown"
            raise HubError(
                f"another Hub (process {holder}) is using this root; stop it or choose another --root",
                path=root,
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class Store:
    """All repositories below a root directory.

    Args:
        root: The Hub's directory; created when missing. The caller holds its lock: nobody else writes there.

    Raises:
        HubError: The directory cannot be created or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._repos = root / "repos"
        self._scratch = root / "tmp"
        self._cache = ObjectCache()
        self._open: dict[RepoId, Repository] = {}
        self._lock = threading.Lock()
        try:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch.mkdir(parents=True, exist_ok=True)
            self._repos.mkdir(exist_ok=True)
            # Private repositories are private to other users of this machine, too.
            for folder in (self._scratch, self._repos):
                folder.chmod(0o700)
            _remove_stale_locks(self._repos)
            # Where repositories went that were moved. What each one was called travels with it, so this can be
            # made again, and a repository that is gone takes its former names with it.
            self._moved = {
                RepoId(repo.kind, *name.split("/")): repo
                for kind in KINDS.values()
                for repo in self.repositories(kind)
                for name in _former(self._path(repo))
            }
        except OSError as error:
            raise HubError(f"cannot use it as the Hub's root: {error.strerror}", path=root) from error

    def create(self, repo: RepoId, *, private: bool, author: str) -> None:
        """Create a repository with an initial commit on its default branch.

        Raises:
            Conflict: It exists.
        """
        path = self._path(repo)
        if path.exists():
            raise _exists(repo)
        with tempfile.TemporaryDirectory(prefix="repo-", dir=self._scratch) as scratch:
            new = Path(scratch) / "new.git"
            with Repo.init_bare(str(new), mkdir=True, default_branch=DEFAULT_BRANCH.encode()) as git:
                write_initial_commit(git, _INITIAL_FILES, author, Path(scratch))
            _write_settings(new, Settings(private=private, created=int(time.time())))
            for folder, _, files in os.walk(new):
                for name in files:
                    sync(Path(folder) / name)
                sync(Path(folder))
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                if self._in_any_case(repo) is not None:
                    raise _exists(repo)
                os.rename(new, path)
        for above in (path.parent, path.parent.parent, self._repos):
            sync(above)

    def delete(self, repo: RepoId) -> bool:
        """Remove a repository and its history; returns False when there is none."""
        git = self.get(repo)
        if git is None:
            return False
        with tempfile.TemporaryDirectory(prefix="gone-", dir=self._scratch) as gone:
            try:
                with git.exclusive(), self._lock:
                    os.rename(git.path, Path(gone) / git.path.name)
                    git.retire()
                    del self._open[repo]
            except NotGitRepository:
                # Somebody else deleted it first.
                return False
            sync(git.path.parent)
        return True

    def move(self, old: RepoId, new: RepoId) -> bool:
        """Rename a repository, with everything in it; returns False when there is none.

        Raises:
            Conflict: The new name is taken.
        """
        git = self.get(old)
        if git is None:
            return False
        path = self._path(new)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with git.exclusive(), self._lock:
                if self._in_any_case(new) not in (None, old) or path.exists():
                    raise Conflict(f"A {new.kind} repository called {new} already exists")
                # Written before the one rename that moves all: a former name that is the present one harms nobody.
                settings = self.settings(old)
                former = [name for name in settings.former if name not in (str(old), str(new))]
                settings = replace(settings, former=(*former, str(old)))
                _write_settings(git.path, settings)
                os.rename(git.path, path)
                git.retire()
                del self._open[old]
                self._moved |= {RepoId(new.kind, *name.split("/")): new for name in settings.former}
        except NotGitRepository:
            return False
        for folder in {git.path.parent, path.parent, path.parent.parent}:
            sync(folder)
        return True

    def get(self, repo: RepoId) -> Repository | None:
        """The repository, or None when there is none."""
        git = self._open.get(repo)
        if git is not None:
            return git
        with self._lock:
            try:
                return self._open.setdefault(repo, Repository(self._path(repo), self._cache, self._scratch))
            except NotGitRepository:
                return None

    def moved(self, repo: RepoId) -> RepoId | None:
        """The present id of a repository that had this one once; None when there is none, or it is gone."""
        new = self._moved.get(repo) or self._in_any_case(repo)
        # One that was made just after the caller missed it is found under its own name, and has not moved.
        return new if new not in (None, repo) and self.get(new) is not None else None

    def _in_any_case(self, repo: RepoId) -> RepoId | None:
        """The id of the repository of this name, whatever its capitals: no two may differ in these only."""
        for folder in (self._repos / f"{repo.kind}s").glob("*"):
            if folder.name.lower() == repo.namespace.lower():
                for path in folder.glob("*.git"):
                    if path.stem.lower() == repo.name.lower():
                        return RepoId(repo.kind, folder.name, path.stem)
        return None

    def settings(self, repo: RepoId) -> Settings:
        """Settings of an existing repository."""
        fields = json.loads((self._path(repo) / _SETTINGS).read_text(encoding="utf-8"))
        return Settings(**fields | {"former": tuple(fields.get("former", ()))})

    def update(self, repo: RepoId, settings: Settings) -> None:
        """Replace the settings of an existing repository."""
        _write_settings(self._path(repo), settings)

    def repositories(self, only: RepoKind | None = None) -> Iterator[RepoId]:
        """All repositories of a kind (or of every kind), sorted by name within a kind."""
        for kind in KINDS.values() if only is None else (only,):
            for path in sorted((self._repos / f"{kind}s").glob("*/*.git")):
                if is_name(path.parent.name) and is_name(path.stem):
                    yield RepoId(kind, path.parent.name, path.stem)

    def _path(self, repo: RepoId) -> Path:
        return self._repos / f"{repo.kind}s" / repo.namespace / f"{repo.name}.git"


def _exists(repo: RepoId) -> Exception:
    return Conflict(f"You already created this {repo.kind} repo: {repo}")


def _former(folder: Path) -> list[str]:
    """Former names of a repository, as far as they can be read: a damaged one is fsck's business."""
    try:
        names = json.loads((folder / _SETTINGS).read_text(encoding="utf-8")).get("former", [])
        return [name for name in names if name.count("/") == 1]
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def _write_settings(folder: Path, settings: Settings) -> None:
    replace_durably(folder / _SETTINGS, json.dumps(asdict(settings), sort_keys=True) + "\n")


def _remove_stale_locks(repos: Path) -> None:
    # dulwich locks a ref by creating a file; a Hub that was killed leaves it, and the ref could never move
    # again. Whoever holds the root's lock may remove it: no other writer is alive.
    for folder in repos.glob("*/*/*.git"):
        for lock in [*folder.glob("*.lock"), *(folder / "refs").rglob("*.lock")]:
            lock.unlink()
        LargeFiles(folder / "lfs").clear_incoming()
