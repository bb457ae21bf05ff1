"""Change files in a git tree, touching only the folders on the way to them."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dulwich.objects import ObjectID, ShaFile, Tree

from .paths import printable
from .problems import bad_request, entry_not_found

FILE_MODE = 0o100644


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
        """Whether it is a plain file: no folder, symbolic link or submodule."""
        return stat.S_ISREG(self.mode)


@dataclass
class _Folder:
    """A folder that has been opened for changes."""

    entries: dict[str, TreeEntry | _Folder] = field(default_factory=dict)


class TreeEditor:
    """Applies operations in order to a tree, in memory, until ``write``.

    Args:
        load: Reads a tree by id.
        root: Id of the tree to start from.
    """

    def __init__(self, load: Callable[[str], Mapping[str, TreeEntry]], root: str) -> None:
        self._load = load
        self._root = _Folder(dict(load(root)))

    def put(self, path: str, blob: str) -> None:
        """Add or replace a file.

        Raises:
            Problem: 400 when a folder stands at ``path``, or a file where a folder is needed.
        """
        *parents, name = path.split("/")
        folder = self._root
        for parent in parents:
            below = self._open(folder, parent)
            if below is None:
                if parent in folder.entries:
                    raise bad_request(
                        f"cannot add {printable(path)!r}: {printable(parent)!r} is a file there"
                    )
                below = folder.entries[parent] = _Folder()
            folder = below
        old = folder.entries.get(name)
        if _holds_anything(old) if isinstance(old, _Folder) else (old is not None and old.is_folder):
            raise bad_request(f"cannot add {printable(path)!r}: a folder of this name exists")
        mode = old.mode if isinstance(old, TreeEntry) and old.is_file else FILE_MODE
        folder.entries[name] = TreeEntry(mode, blob)

    def delete_file(self, path: str) -> None:
        """Remove a file.

        Raises:
            Problem: 404 ``EntryNotFound`` when there is no file of this name.
        """
        found = self._find(path)
        if found is not None:
            folder, name = found
            entry = folder.entries[name]
            if isinstance(entry, TreeEntry) and not entry.is_folder:
                del folder.entries[name]
                return
        # The client recognizes this wording and adds advice about trailing slashes.
        raise entry_not_found(f"A file with this name doesn't exist: {printable(path)}")

    def delete_folder(self, path: str) -> None:
        """Remove a folder with everything in it.

        Raises:
            Problem: 404 ``EntryNotFound`` when there is no folder of this name.
        """
        found = self._find(path)
        if found is not None:
            folder, name = found
            entry = folder.entries[name]
            if _holds_anything(entry) if isinstance(entry, _Folder) else entry.is_folder:
                del folder.entries[name]
                return
        raise entry_not_found(f"A folder with this name doesn't exist: {printable(path)}")

    def write(self, add: Callable[[ShaFile], str]) -> str:
        """Store the changed trees through ``add``; returns the root's id."""
        return self._write(self._root, add)

    def _write(self, folder: _Folder, add: Callable[[ShaFile], str]) -> str:
        tree = Tree()
        for name, entry in folder.entries.items():
            if isinstance(entry, _Folder):
                if not _holds_anything(entry):
                    continue
                entry = TreeEntry(stat.S_IFDIR, self._write(entry, add))
            tree.add(name.encode("utf-8", "surrogateescape"), entry.mode, ObjectID(entry.oid.encode("ascii")))
        return add(tree)

    def _open(self, folder: _Folder, name: str) -> _Folder | None:
        entry = folder.entries.get(name)
        if isinstance(entry, TreeEntry) and entry.is_folder:
            opened = folder.entries[name] = _Folder(dict(self._load(entry.oid)))
            return opened
        return entry if isinstance(entry, _Folder) else None

    def _find(self, path: str) -> tuple[_Folder, str] | None:
        *parents, name = path.split("/")
        folder = self._root
        for parent in parents:
            below = self._open(folder, parent)
            if below is None:
                return None
            folder = below
        return (folder, name) if name in folder.entries else None


def _holds_anything(folder: _Folder) -> bool:
    # Git knows no empty folders: one whose files are all gone disappears.
    return any(not isinstance(entry, _Folder) or _holds_anything(entry) for entry in folder.entries.values())
