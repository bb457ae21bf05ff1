"""Reading of single files: their bytes, and the syntax trees of those in Python."""

from __future__ import annotations

import ast
import codecs
import gc
import io
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kernelpress.errors import SourceError
from kernelpress.syntax.text import MOST_NESTED, SourceText, nesting, parse

# In these, offsets in bytes of a file and in UTF-8, which Python counts in, are the same.
_ENCODINGS = ("utf-8", "utf-8-sig", "ascii")


@dataclass(frozen=True)
class SourceFile:
    """One file that ships: its path in the kernel (with forward slashes), its content, and where it came from."""

    path: str
    data: bytes
    origin: Path | None = None

    @property
    def is_python(self) -> bool:
        """True for a file of Python source, stubs included."""
        return self.path.endswith((".py", ".pyi"))

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree of a Python file, parsed once.

        Raises:
            SyntaxError: The file is no Python. Those that ``read_file`` returns are.
        """
        return parse(self.data, str(self.origin or self.path))

    @cached_property
    def text(self) -> SourceText:
        """The content with the offsets of its lines."""
        return SourceText(self.data)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Hold no garbage collections meanwhile.

    Syntax trees hold no cycles, yet each collection would walk through all of them: that takes several times as long
    as to parse.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_file(origin: Path, path: str) -> SourceFile:
    """Read a file that comes to stand at ``path`` in the kernel; one of Python is parsed.

    Raises:
        SourceError: The file cannot be read; or, for a Python file, it is not UTF-8, is no Python, or is nested more
            deeply than ``MOST_NESTED``; with the line.
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


def _line_of_nul(data: bytes) -> int | None:
    """The line of the first zero byte, which Python refuses without a line."""
    offset = data.find(b"\0")
    return None if offset < 0 else data.count(b"\n", 0, offset) + 1
