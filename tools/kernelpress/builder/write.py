"""Writes a build aside, then swaps it with the one before, so that no moment shows half of one."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from kernelpress.conventions import VARIANT_PREFIX
from kernelpress.errors import BuildError

if TYPE_CHECKING:
    from kernelpress.builder.model import Variant, VariantFile

# A directory beside the build is never touched unless this file is in it.
_MARK = "made-by-kernelpress"
_MARK_TEXT = "Holds a build while it is written; the next build clears it away.\n"


def replace(directory: Path, variants: Sequence[Variant]) -> None:
    """Put variants in the place of those in a directory; whatever else stands there stays.

    Raises:
        BuildError: Something that kernelpress did not make is in the way.
        OSError: The directory cannot be written; the variants before are still whole then.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists() and not directory.is_dir():
        raise BuildError("this is in the way of the build directory; move it", path=directory)
    with _locked(directory.parent):
        _recover(directory)
        if _holds(directory, variants):
            return
        aside = _aside(directory)
        aside.mkdir()
        try:
            (aside / _MARK).write_text(_MARK_TEXT)
            fresh = aside / "new"
            fresh.mkdir()
            fresh.chmod(0o755)
            for variant in variants:
                _write(fresh / variant.name, variant.files)
            _keep_foreign(directory, fresh)
            _swap(directory, fresh, aside / "old")
        finally:
            # Where the build before could not even be put back, the next build does it.
            if directory.exists() or not (aside / "old").exists():
                with suppress(OSError):
                    _discard(aside)


def _holds(directory: Path, variants: Sequence[Variant]) -> bool:
    """True if a directory holds just these variants, byte for byte and with the modes that they are written with."""
    expected = {f"{variant.name}/{file.path}": file.data for variant in variants for file in variant.files}
    folders = {str(parent) for name in expected for parent in PurePosixPath(name).parents} - {"."}
    pending = [variant.name for variant in variants]
    if not directory.is_dir() or {
        path.name for path in directory.iterdir() if path.name.startswith(VARIANT_PREFIX)
    } != set(pending):
        return False
    while pending:
        folder = pending.pop()
        with os.scandir(directory / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}"
                mode = entry.stat(follow_symlinks=False).st_mode
                if mode == stat.S_IFDIR | 0o755 and name in folders:
                    pending.append(name)
                    folders.discard(name)
                elif mode != stat.S_IFREG | 0o644 or Path(entry.path).read_bytes() != expected.pop(
                    name, None
                ):
                    return False
    return not expected


def _write(root: Path, files: Iterable[VariantFile]) -> None:
    # Modes are set and not left to the umask: they are part of what must come out the same everywhere.
    folders = set()
    for file in files:
        path = root / file.path
        for folder in [*reversed(path.parent.relative_to(root).parents), path.parent.relative_to(root)]:
            if folder not in folders:
                folders.add(folder)
                (root / folder).mkdir(exist_ok=True)
                (root / folder).chmod(0o755)
        path.write_bytes(file.data)
        path.chmod(0o644)


def _keep_foreign(directory: Path, fresh: Path) -> None:
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.name.startswith(VARIANT_PREFIX) and path.is_dir() and not path.is_symlink():
            continue
        if (fresh / path.name).exists():
            raise BuildError("this is in the way of a variant of that name; move it", path=path)
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, fresh / path.name, symlinks=True)
        else:
            shutil.copy2(path, fresh / path.name, follow_symlinks=False)


def _swap(directory: Path, fresh: Path, old: Path) -> None:
    if directory.exists():
        directory.rename(old)
    try:
        fresh.rename(directory)
    except BaseException:
        if old.exists():
            old.rename(directory)
        raise


def _recover(directory: Path) -> None:
    """Finish or undo a build that was killed; the lock says that none is running."""
    aside = _aside(directory)
    if not os.path.lexists(aside):
        return
    if aside.is_symlink() or not aside.is_dir() or not _ours(aside):
        raise BuildError("this is in the way of the build, which did not make it; move it", path=aside)
    if (aside / "old").is_dir() and not directory.exists():
        (aside / "old").rename(directory)
    _discard(aside)


def _ours(aside: Path) -> bool:
    names = {path.name for path in aside.iterdir()}
    if not names:
        return True
    mark = aside / _MARK
    text = mark.read_text("utf-8", "replace") if mark.is_file() else None
    # A build that was killed while it left the mark leaves some of it, and nothing else.
    return text == _MARK_TEXT or (text is not None and names == {_MARK} and _MARK_TEXT.startswith(text))


def _discard(aside: Path) -> None:
    # The mark goes last, so that whoever is killed here leaves what the next build knows for its own.
    for name in ("new", "old"):
        if (aside / name).exists():
            shutil.rmtree(aside / name)
    (aside / _MARK).unlink(missing_ok=True)
    aside.rmdir()


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.kernelpress")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one build at a time write into a folder; a lock on the folder itself leaves no file behind."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where builds in one place must take turns by themselves
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
