"""The files of a built variant to compare with."""

from __future__ import annotations

from pathlib import Path

from kernelpress.conventions import VARIANT_PREFIX
from kernelpress.errors import CheckError


def read_variant(directory: Path) -> dict[str, bytes]:
    """Read the Python files of a variant, or of the first variant of a build, by their paths in it.

    Raises:
        CheckError: There is no such directory.
    """
    if not directory.is_dir():
        raise CheckError("there is no build here; run `kernelpress build` first", path=directory)
    variants = sorted(path for path in directory.glob(f"{VARIANT_PREFIX}*") if path.is_dir())
    root = variants[0] if variants else directory
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.py"))}
