"""Files as they are read, before anything is made of them."""

from __future__ import annotations

import ast
import codecs
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

from kernelpress.bindings import MENTIONS, bound_names
from kernelpress.errors import SourceError
from kernelpress.memory import Memory, key
from kernelpress.text import MOST_NESTED, nesting, parse

# In these, offsets in bytes of a file and in UTF-8, which Python counts in, are the same.
_ENCODINGS = ("utf-8", "utf-8-sig", "ascii")


@dataclass(frozen=True)
class SourceFile:
    """One file that ships: its path in the kernel (with forward slashes), its content, and where it came from."""

    path: str
    data: bytes
    origin: Path | None = None


def read_python(path: Path, memory: Memory) -> bytes:
    """Read a Python source; one of the same content as before is not parsed again.

    Raises:
        SourceError: It cannot be read, is not UTF-8, is no Python, or is nested more deeply than ``MOST_NESTED``;
            with the line.
    """
    data = read_bytes(path)
    known = key("syntax", data)
    if not memory.get(known):
        tree = _checked(path, data)
        if MENTIONS.search(data):
            # Asked for later, when the tree is no more.
            bound_names(data, memory, tree)
        memory.put(known, True)
    return data


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        SourceError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", path=path) from None


def _checked(path: Path, data: bytes) -> ast.Module:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = data.count(b"\n", 0, error.start) + 1
        raise SourceError("not UTF-8; save the file in that encoding", path=path, line=bad) from None
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        if codecs.lookup(encoding).name not in _ENCODINGS:
            raise SourceError(
                f"its first lines say that it is {encoding}; save it as UTF-8 and take that comment out",
                path=path,
            )
        tree = parse(data, str(path))
        line, deepest = nesting(tree)
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
    return tree


def _line_of_nul(data: bytes) -> int | None:
    """Python refuses a source with a zero byte without saying where."""
    at = data.find(b"\0")
    return None if at < 0 else data.count(b"\n", 0, at) + 1
