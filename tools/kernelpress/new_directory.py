"""A directory that is written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kernelpress.errors import BuildError, KernelpressError


@contextmanager
def new_directory(path: Path, error: type[KernelpressError] = BuildError) -> Iterator[Path]:
    """A temporary directory to fill, which becomes ``path`` when the block ends without an exception.

    Args:
        path: A directory that is not there yet, or empty.
        error: The class of error to raise.

    Raises:
        KernelpressError: Something cannot be written; nothing is left half-written.
    """
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.absolute().parent))
        try:
            yield fresh
            fresh.chmod(0o755)
            if path.exists():
                path.rmdir()
            fresh.rename(path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as failure:
        raise error(f"cannot be written: {failure.strerror}", path=failure.filename or path) from failure
