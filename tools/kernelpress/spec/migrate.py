"""Brings an older build.toml to today's edition, with comments and order kept."""

from __future__ import annotations

import os
from pathlib import Path

from kernelpress.errors import SpecError
from kernelpress.spec.document import read_text
from kernelpress.spec.editions import upgrade
from kernelpress.spec.load import BUILD_TOML, load_spec
from kernelpress.spec.model import Spec


def migrate(directory: Path, license: str | None = None) -> Spec | None:
    """Rewrite an older build.toml in place.

    Reads every form without compiled parts: those with ``universal = true``, the one without a framework's table
    (edition 3), and the one with ``[torch-noarch]`` and no ``edition`` (4).

    Args:
        directory: The directory that holds build.toml.
        license: An SPDX identifier, for forms from when there was no key for it.

    Returns:
        The spec that the file describes now; ``None`` if there was nothing to do.

    Raises:
        SpecError: The file describes compiled sources, or lacks something that only its author knows; it stays as it
            was.
    """
    path = directory / BUILD_TOML
    try:
        upgraded = upgrade(read_text(path), path, license)
    except FileNotFoundError:
        raise SpecError(
            "there is no build.toml here; name the directory of a kernel", path=directory
        ) from None
    if upgraded is None:
        return None
    # Beside the old file, so that what does not hold even now never takes its place.
    scratch = path.with_name(f".build.toml.{os.getpid()}")
    scratch.mkdir()
    try:
        (scratch / path.name).write_text(upgraded, "utf-8")
        load_spec(scratch)
        (scratch / path.name).replace(path)
    except SpecError as error:
        raise SpecError(f"after migration: {error.message}", path=path) from None
    finally:
        (scratch / path.name).unlink(missing_ok=True)
        scratch.rmdir()
    return load_spec(directory)
