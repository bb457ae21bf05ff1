"""Reading of single files: their bytes, and the syntax trees of those in Python."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kernelpress.syntax.text import SourceText, parse


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
