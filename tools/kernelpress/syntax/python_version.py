"""Syntax that is newer than the oldest Python that a kernel must load on, found by ruff.

Python's own parser cannot tell: ``ast.parse(feature_version=...)`` lets a star in a subscript pass (3.11) and what
f-strings may hold since 3.12.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruff import find_ruff_bin  # type: ignore[import-untyped]

from kernelpress.errors import BuildError, CheckError
from kernelpress.syntax.source_file import SourceFile

# A kernel must load on it.
OLDEST_PYTHON = (3, 10)


def newer_syntax(files: Iterable[SourceFile]) -> Iterator[tuple[SourceFile, int, str]]:
    """Each place where a Python file has syntax that ``OLDEST_PYTHON`` does not know: file, line, message.

    Raises:
        BuildError: There is no room for the copies that ruff reads.
        CheckError: Ruff cannot be run.
    """
    version = ".".join(map(str, OLDEST_PYTHON))
    with TemporaryDirectory(prefix="kernelpress-") as folder:
        # Copies, because ruff must see what was read, and not what stands on the disk by now.
        copies = {
            str(Path(folder, f"{number}.py").resolve()): file
            for number, file in enumerate(files)
            if file.path.endswith(".py")
        }
        for copy, file in copies.items():
            try:
                Path(copy).write_bytes(file.data)
            except OSError as error:
                raise BuildError(f"cannot be written: {error.strerror}", path=copy) from None
        errors = _ruff(folder, version) if copies else []
    for line, path, message in sorted(
        (entry["location"]["row"], entry["filename"], entry["message"]) for entry in errors
    ):
        if f" on Python {version} (" in message:
            yield copies[path], line, f"{message[:1].lower()}{message[1:]}"


def _ruff(folder: str, version: str) -> list[dict[str, Any]]:
    """Syntax errors in the files of a folder."""
    options = [
        "check", "--isolated", "--no-cache", "--no-respect-gitignore", "--quiet", "--exit-zero",
        "--config=exclude=[]", f"--config=target-version='py{version.replace('.', '')}'",
        # Syntax errors come with any choice of rules; this rule is that a file can be read.
        "--select=E902", "--output-format=json", folder,
    ]  # fmt: skip
    try:
        process = subprocess.run(
            [find_ruff_bin(), *options], capture_output=True, text=True, encoding="utf-8", check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise CheckError(f"ruff, which looks for newer syntax, cannot be run: {reason}") from None
    errors: list[dict[str, Any]] = json.loads(process.stdout)
    return errors
