"""Files as they are read, before anything is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kernelpress.errors import SourceError
from kernelpress.memory import Memory, key
from kernelpress.text import parse


@dataclass(frozen=True)
class SourceFile:
    """One file that ships: its path in the kernel (with forward slashes), its content, and where it came from."""

    path: str
    data: bytes
    origin: Path | None = None


def read_python(path: Path, memory: Memory) -> bytes:
    """Read a Python source; one of the same content as before is not parsed again.

    Raises:
        SourceError: It cannot be read, is not UTF-8 or is no Python; with the line.
    """
    data = read_bytes(path)
    known = key("syntax", data)
    if not memory.get(known):
        _check_syntax(path, data)
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


def _check_syntax(path: Path, data: bytes) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError("not UTF-8; save the file in that encoding", path=path, line=line) from None
    try:
        parse(data, str(path))
    except SyntaxError as error:
        raise SourceError(f"syntax error: {error.msg}", path=path, line=error.lineno) from None
    except ValueError as error:
        raise SourceError(f"not Python source: {error}", path=path) from None
