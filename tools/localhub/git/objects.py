"""Git objects on disk: a bounded cache for reading, and a durable batch for writing."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO

from dulwich.objects import ShaFile

_CHUNK = 256 << 10


class ObjectCache:
    """Least-recently-used cache of immutable values, bounded by their size in bytes; thread-safe.

    Args:
        max_bytes: Bound on the sum of all sizes.
        max_item_bytes: Larger values are not kept, so that one big file cannot push out everything else.
    """

    def __init__(self, max_bytes: int = 128 << 20, max_item_bytes: int = 8 << 20) -> None:
        self._max_bytes = max_bytes
        self._max_item_bytes = max_item_bytes
        self._bytes = 0
        self._items: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> object | None:
        """Return the value kept under ``key``, or None."""
        with self._lock:
            item = self._items.get(key)
            if item is None:
                return None
            self._items.move_to_end(key)
            return item[0]

    def put(self, key: Hashable, value: object, size: int) -> None:
        """Keep ``value``, which takes about ``size`` bytes, under ``key``."""
        # The overhead of the entry itself counts too: otherwise empty files would be free.
        size += 256
        if size > self._max_item_bytes:
            return
        with self._lock:
            if key in self._items:
                return
            self._items[key] = (value, size)
            self._bytes += size
            while self._bytes > self._max_bytes:
                _, (_, dropped) = self._items.popitem(last=False)
                self._bytes -= dropped


class ObjectBatch:
    """New objects of one commit, staged aside until all of them are ready; a context manager.

    dulwich writes loose objects one at a time and without syncing their directories, so the batch has its
    own path: all files are written first and synced afterwards (the file system can then flush them
    together), moved to their places, and the directories synced. A batch that is left without ``publish``
    leaves nothing behind.

    Args:
        objects: The repository's ``objects`` directory.
        scratch: A directory on the same file system.
    """

    def __init__(self, objects: Path, scratch: Path) -> None:
        self._objects = objects
        self._staging = Path(tempfile.mkdtemp(prefix="objects-", dir=scratch))
        self._staged: dict[str, Path] = {}

    def __enter__(self) -> ObjectBatch:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)

    def add(self, obj: ShaFile) -> str:
        """Stage ``obj`` unless the repository has it; returns its id."""
        oid = obj.id.decode("ascii")
        if oid not in self._staged and not self._final_path(oid).exists():
            path = self._staging / oid
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
            with open(descriptor, "wb") as file:
                file.write(obj.as_legacy_object())
            self._staged[oid] = path
        return oid

    def get(self, oid: str) -> ShaFile | None:
        """The object ``oid`` if it is staged here."""
        path = self._staged.get(oid)
        return None if path is None else ShaFile.from_path(path)

    def publish(self) -> None:
        """Make all staged objects part of the repository; they are on stable storage when this returns."""
        for path in self._staged.values():
            sync(path)
        folders = set()
        for oid, path in self._staged.items():
            final_path = self._final_path(oid)
            final_path.parent.mkdir(exist_ok=True)
            os.replace(path, final_path)
            folders.add(final_path.parent)
        for folder in folders:
            sync(folder)
        if folders:
            sync(self._objects)
        self._staged.clear()

    def _final_path(self, oid: str) -> Path:
        return self._objects / oid[:2] / oid[2:]


def loose_blob_size(path: Path) -> int | None:
    """Size in bytes of the blob in a loose object's file; None if there is no such file, or no blob in it."""
    try:
        with path.open("rb") as file:
            header = zlib.decompressobj().decompress(file.read(128), 64)
    # What cannot be read is said by whoever reads it all.
    except (FileNotFoundError, zlib.error):
        return None
    kind, _, rest = header.partition(b" ")
    return int(rest.partition(b"\0")[0]) if kind == b"blob" else None


def read_loose_blob(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Bytes ``start`` to ``stop`` (exclusive) of the blob in a loose object's file, in pieces."""
    position = 0
    with path.open("rb") as file:
        pieces = _decompress(file)
        # The content follows a header that ends with the first zero byte.
        for piece in chain([next(pieces).partition(b"\0")[2]], pieces):
            part = piece[max(0, start - position) : stop - position]
            position += len(piece)
            if part:
                yield part
            if position >= stop:
                return


def _decompress(file: IO[bytes]) -> Iterator[bytes]:
    unzip = zlib.decompressobj()
    while data := unzip.unconsumed_tail or file.read(_CHUNK):
        yield unzip.decompress(data, _CHUNK)
    yield unzip.flush()


def sync(path: Path) -> None:
    """Flush a file or a directory to stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file so that a crash leaves its old content or its new one; one writer at a time."""
    aside = path.with_name(f"{path.name}.new")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
        sync(aside)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)
