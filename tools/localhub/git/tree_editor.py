"""Change files in a git tree, touching only the folders on the way to them."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dulwich.objects import ObjectID, ShaFile, Tree

from ..errors import EntryNotFound, InvalidInput
from ..names import printable


@dataclass(frozen=True)
class TreeEntry:
    """One name in a git tree.

    Args:
        mode: Git's mode bits.
        oid: Id of the blob or tree.
    """

    mode: int
    oid: str

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """True for a plain file: no folder, symbolic link or submodule."""
        return stat.S_ISREG(self.mode)


# A folder that has been opened for changes is a dictionary; one that has not is still its entry.
_Folder = dict[str, "TreeEntry | _Folder"]


class TreeEditor:
    """Applies operations in order to a tree, in memory, until ``write``.

    Args:
        load: Reads a tree by id.
        root: Id of the tree to start from.
    """

    def __init__(self, load: Callable[[str], Mapping[str, TreeEntry]], root: str) -> None:
        self._load = load
        self._root: _Folder = dict(load(root))

    def put(self, path: str, blob: str) -> None:
        """Add or replace a file.

        Raises:
            InvalidInput: A folder stands at ``path``, or a file where a folder is needed.
        """
        *parents, name = path.split("/")
        folder = self._root
        for parent in parents:
            child = self._open(folder, parent)
            if child is None:
                if parent in folder:
                    raise InvalidInput(
                        f"cannot add {printable(path)!r}: {printable(parent)!r} is a file there"
                    )
                child = folder[parent] = {}
            folder = child
        old = folder.get(name)
        if old is not None and _is_folder(old):
            raise InvalidInput(f"cannot add {printable(path)!r}: a folder of this name exists")
        mode = old.mode if isinstance(old, TreeEntry) and old.is_file else stat.S_IFREG | 0o644
        folder[name] = TreeEntry(mode, blob)

    def file(self, name: str) -> str | None:
        """Id of the blob of a plain file at the top, or None."""
        entry = self._root.get(name)
        return entry.oid if isinstance(entry, TreeEntry) and entry.is_file else None

    def delete_file(self, path: str) -> None:
        """Remove a file, or a folder with everything in it, as the Hugging Face Hub does.

        Raises:
            EntryNotFound: There is nothing of this name.
        """
        self._delete(path, is_folder=False)

    def delete_folder(self, path: str) -> None:
        """Remove a folder with everything in it.

        Raises:
            EntryNotFound: There is no folder of this name.
        """
        self._delete(path, is_folder=True)

    def _delete(self, path: str, *, is_folder: bool) -> None:
        *parents, name = path.split("/")
        folder: _Folder | None = self._root
        for parent in parents:
            folder = None if folder is None else self._open(folder, parent)
        entry = None if folder is None else folder.get(name)
        # An opened folder whose files are all gone is none.
        gone = isinstance(entry, dict) and not _is_folder(entry)
        if folder is None or entry is None or gone or (is_folder and not _is_folder(entry)):
            # The client recognizes this wording and adds advice about trailing slashes.
            kind = "folder" if is_folder else "file"
            raise EntryNotFound(f"A {kind} with this name doesn't exist: {printable(path)}")
        del folder[name]

    def write(self, add: Callable[[ShaFile], str]) -> str:
        """Store the changed trees through ``add``; returns the root's id."""
        return self._write(self._root, add)

    def _write(self, folder: _Folder, add: Callable[[ShaFile], str]) -> str:
        tree = Tree()
        for name, entry in folder.items():
            if isinstance(entry, dict):
                if not _is_folder(entry):
                    continue
                entry = TreeEntry(stat.S_IFDIR, self._write(entry, add))
            tree.add(name.encode("utf-8", "surrogateescape"), entry.mode, ObjectID(entry.oid.encode("ascii")))
        return add(tree)

    def _open(self, folder: _Folder, name: str) -> _Folder | None:
        entry = folder.get(name)
        if isinstance(entry, TreeEntry) and entry.is_folder:
            entry = folder[name] = dict(self._load(entry.oid))
        return entry if isinstance(entry, dict) else None


def _is_folder(entry: TreeEntry | _Folder) -> bool:
    """True for a folder that holds any file: git knows no empty ones."""
    if isinstance(entry, TreeEntry):
        return entry.is_folder
    return any(isinstance(below, TreeEntry) or _is_folder(below) for below in entry.values())
