"""Reads single files, and refuses Python that cannot be built."""

from __future__ import annotations

import codecs
import io
import tokenize
from pathlib import Path

from kernelpress.errors import SourceError
from kernelpress.findings.model import Finding, FindingsError
from kernelpress.syntax.python_version import OLDEST_PYTHON, newer_syntax
from kernelpress.syntax.source_file import SourceFile
from kernelpress.syntax.text import MOST_NESTED, nesting

# In these, offsets in bytes of a file and in UTF-8, which Python counts in, are the same.
_ENCODINGS = ("utf-8", "utf-8-sig", "ascii")


def read_file(origin: Path, path: str) -> SourceFile:
    """Read a file that comes to stand at ``path`` in the kernel; one of Python is parsed.

    Raises:
        SourceError: The file cannot be read; or, for a Python file, it is not UTF-8, is no Python, or is nested more
            deeply than ``MOST_NESTED``; with the line.
        FindingsError: It has syntax that this Python does not know, and a newer one does.
    """
    try:
        file = SourceFile(path, origin.read_bytes(), origin)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", path=origin) from None
    if file.is_python:
        _check_python(file, origin)
    return file


def _check_python(file: SourceFile, path: Path) -> None:
    data = file.data
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad_line = data.count(b"\n", 0, error.start) + 1
        raise SourceError("not UTF-8; save the file in that encoding", path=path, line=bad_line) from None
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        if codecs.lookup(encoding).name not in _ENCODINGS:
            raise SourceError(
                f"its first lines say that it is {encoding}; save it as UTF-8 and take that comment out",
                path=path,
            )
        line, deepest = nesting(file.tree)
    except SyntaxError as error:
        newer = [newer_syntax_finding(file, line, message) for file, line, message in newer_syntax([file])]
        if newer:
            raise FindingsError(newer, newer) from None
        raise SourceError(
            f"syntax error: {error.msg}", path=path, line=error.lineno or _line_of_nul(data)
        ) from None
    except ValueError as error:
        raise SourceError(f"not Python source: {error}", path=path, line=_line_of_nul(data)) from None
    except (MemoryError, RecursionError):
        raise SourceError("nested too deeply for Python's own parser; take it apart", path=path) from None
    if deepest > MOST_NESTED:
        raise SourceError(
            f"nested {deepest} deep, and more than {MOST_NESTED} cannot be followed; take the expression or the "
            "chain of branches apart",
            path=path,
            line=line,
        )


def newer_syntax_finding(file: SourceFile, line: int, message: str) -> Finding:
    """The finding (KP301) about syntax that is newer than the oldest Python."""
    version = ".".join(map(str, OLDEST_PYTHON))
    path = file.origin or Path(file.path)
    return Finding("KP301", "error", path, line, message, f"write it as Python {version} reads it")


def _line_of_nul(data: bytes) -> int | None:
    """The line of the first zero byte, which Python refuses without a line."""
    offset = data.find(b"\0")
    return None if offset < 0 else data.count(b"\n", 0, offset) + 1
