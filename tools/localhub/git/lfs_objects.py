"""Large files: kept beside git in git-lfs's own layout, with a pointer to each in the tree."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import InvalidInput
from .objects import sync

MAX_POINTER = 200
_CHUNK = 256 << 10
# dulwich.lfs reads more than git-lfs does: digests that are none, sizes like "1_0", lines in any order or twice.
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize ([0-9]{1,15})\n?"
)


@dataclass(frozen=True)
class LargeFile:
    """A large file: hex digest of its content, and its size in bytes."""

    sha256: str
    size: int

    @property
    def pointer(self) -> bytes:
        """The content of the blob that stands for the file in git (https://git-lfs.com, specification v1)."""
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        ).encode("ascii")


def parse_pointer(data: bytes) -> LargeFile | None:
    """The large file that ``data`` points to, or None if it is no pointer."""
    match = _POINTER.fullmatch(data)
    return None if match is None else LargeFile(match[1].decode("ascii"), int(match[2]))


class LargeFiles:
    """The large files of one repository.

    A file appears by one rename, after its content has been compared with its name and is on stable storage.

    Args:
        root: Their directory; made when the first file arrives.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, sha256: str) -> Path:
        """Path of the file with this digest, which need not exist."""
        return self._root / "objects" / sha256[:2] / sha256[2:4] / sha256

    def has(self, file: LargeFile) -> bool:
        """True if the file is here, whole."""
        return self.size(file.sha256) == file.size

    def size(self, sha256: str) -> int | None:
        """Size in bytes of the file with this digest, or None when there is none."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def incoming(self) -> IO[bytes]:
        """A new file to write to, for ``keep``; it disappears when it is closed and not kept."""
        return tempfile.NamedTemporaryFile(dir=self._incoming(), prefix="whole-")

    def keep(self, received: IO[bytes], digest: str, file: LargeFile) -> None:
        """Make a received file a large file.

        Args:
            received: From ``incoming``, written completely.
            digest: The hex digest of what was written.
            file: The digest and size that were announced.

        Raises:
            InvalidInput: The content is another.
        """
        received.flush()
        size = os.fstat(received.fileno()).st_size
        if digest != file.sha256 or size != file.size:
            raise InvalidInput(
                f"the content is not what was announced: {size} bytes with sha256 {digest}, "
                f"not {file.size} bytes with {file.sha256}"
            )
        os.fsync(received.fileno())
        path = self.path(file.sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link, so that two uploads of the same content cannot be in each other's way.
        aside = path.with_name(f"{Path(received.name).name}.new")
        os.link(received.name, aside)
        try:
            os.replace(aside, path)
        except OSError:
            aside.unlink()
            raise
        for folder in path.parents[:3]:
            sync(folder)

    def parts(self, file: LargeFile) -> Path:
        """Path of the file in which the parts of an upload are put together; the same for every part."""
        return self._incoming() / f"parts-{file.sha256}"

    def keep_parts(self, file: LargeFile) -> None:
        """Make the parts of an upload a large file.

        Raises:
            InvalidInput: A part is missing or the content is another.
        """
        path = self.parts(file)
        try:
            with path.open("rb") as source:
                self.keep(source, sha256_of(source), file)
        except (FileNotFoundError, InvalidInput) as error:
            # Somebody else may have completed the same file, and taken the parts with it.
            if not self.has(file):
                if isinstance(error, InvalidInput):
                    raise
                raise InvalidInput("no part of this file has arrived; upload it again") from None
        finally:
            path.unlink(missing_ok=True)

    def read(self, file: LargeFile, start: int, stop: int) -> Iterator[bytes]:
        """Bytes ``start`` to ``stop`` (exclusive) of a file that is here, in pieces."""
        with self.path(file.sha256).open("rb") as source:
            source.seek(start)
            left = stop - start
            while left > 0 and (chunk := source.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk

    def all(self) -> Iterator[tuple[str, Path]]:
        """Digests and paths of all files."""
        for path in sorted((self._root / "objects").glob("??/??/*")):
            if len(path.name) == 64:
                yield path.name, path

    def clear_incoming(self) -> None:
        """Forget uploads that were cut off; nobody may be uploading."""
        shutil.rmtree(self._root / "incoming", ignore_errors=True)
        for leftover in (self._root / "objects").glob("??/??/*.new"):
            leftover.unlink()

    def _incoming(self) -> Path:
        folder = self._root / "incoming"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def sha256_of(source: IO[bytes]) -> str:
    """Hex digest of what is left to read, read in pieces."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
