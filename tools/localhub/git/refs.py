"""The refs of a git repository on disk, moved by compare-and-swap and durably."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dulwich.file import FileLocked
from dulwich.objects import ObjectID
from dulwich.refs import Ref
from dulwich.repo import Repo

from ..errors import Conflict
from .objects import sync

BRANCHES = "refs/heads/"
TAGS = "refs/tags/"
PULLS = "refs/pr/"
_KINDS = {BRANCHES: "branch", TAGS: "tag", PULLS: "pull request"}
_LOCK_SECONDS = 5.0


class Refs:
    """Names and what they point to. The caller keeps other writers of this process out while it changes any.

    Args:
        path: The bare repository.
        git: The same, opened.
    """

    def __init__(self, path: Path, git: Repo) -> None:
        self._path = path
        self._git = git

    def under(self, base: str) -> dict[str, str]:
        """Short names below ``base`` and their object ids, sorted by name."""
        refs = self._git.refs.as_dict(Ref(base.rstrip("/").encode()))
        return {name.decode("utf-8", "replace"): oid.decode("ascii") for name, oid in sorted(refs.items())}

    def read(self, ref: str) -> str | None:
        """The object id that a full ref points to, or None."""
        # dulwich raises ValueError for names that cannot be refs; one that is no Unicode is such an error, too.
        try:
            oid: bytes = self._git.refs[Ref(ref.encode("utf-8"))]
        except (KeyError, ValueError, OSError):
            return None
        return oid.decode("ascii")

    def swap(self, ref: str, old: str, new: str) -> bool:
        """Move a ref from ``old`` to ``new``; returns False when it is not at ``old``.

        Raises:
            Conflict: Another process keeps the ref locked.
        """
        moved = self._change(
            ref,
            lambda name: self._git.refs.set_if_equals(name, ObjectID(old.encode()), ObjectID(new.encode())),
        )
        if moved:
            sync((self._path / ref).parent)
        return moved

    def check_new(self, base: str, name: str) -> None:
        """Make sure that ``name`` can be created below ``base``.

        Raises:
            Conflict: It exists or clashes with another's.
        """
        kind = _KINDS[base]
        for other in self.under(base):
            if other == name:
                raise Conflict(f"Reference {base}{name} already exists")
            # A ref is a file: "a" and "a/b" cannot both be.
            if other.startswith(name + "/") or name.startswith(other + "/"):
                raise Conflict(f"{kind} {name!r} cannot exist beside {kind} {other!r}")

    def create(self, base: str, name: str, oid: str) -> None:
        """Create a ref; the object it points to is on stable storage already.

        Raises:
            Conflict: As ``check_new``, or another process keeps the ref locked.
        """
        self.check_new(base, name)
        ref = base + name
        if not self._change(ref, lambda name: self._git.refs.add_if_new(name, ObjectID(oid.encode()))):
            raise Conflict(f"Reference {ref} already exists")
        folder = (self._path / ref).parent
        while folder != self._path:
            sync(folder)
            folder = folder.parent

    def delete(self, ref: str) -> None:
        """Remove a ref that exists.

        Raises:
            Conflict: Another process keeps the ref locked.
        """
        self._change(ref, lambda name: self._git.refs.remove_if_equals(name, None))
        # The folder may have gone with its last ref; its parent's entry is what has to last then.
        folder = (self._path / ref).parent
        while not folder.exists():
            folder = folder.parent
        sync(folder)

    def _change(self, ref: str, change: Callable[[Ref], bool]) -> bool:
        """Run one of dulwich's operations, which lock the ref by a file; leave no lock behind, whatever happens."""
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                return bool(change(Ref(ref.encode("utf-8"))))
            except FileLocked:
                # No writer of ours: somebody runs git in the repository's directory.
                if time.monotonic() > deadline:
                    raise Conflict(f"another git process holds the lock of {ref}; try again") from None
                time.sleep(0.02)
            except OSError as error:
                # dulwich gives up on its lock where writing out what is buffered fails, as on a full disk, and would
                # remove it when its file is collected: at any time, and perhaps the next writer's lock. A lock of
                # another process would have been FileLocked.
                traceback.clear_frames(error.__traceback__)
                for locked in (ref, "packed-refs"):
                    (self._path / f"{locked}.lock").unlink(missing_ok=True)
                raise
