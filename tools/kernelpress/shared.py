"""Names that the files of a package share by importing them, of which an import shows the name alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from kernelpress.files import SourceFile
from kernelpress.handed_on import handed_on
from kernelpress.layout import Layout

_ANNOTATION = rb"\s*(?::[^=\n]*)?=\s*"
_LIBRARY = re.compile(
    rb"^\s*(?:[\w.]+\.)?([A-Za-z_]\w*)" + _ANNOTATION + rb"[\w.]*\b(?:Library|_scoped_library)\("
    rb"|\b([A-Za-z_]\w*)\s*:\s*[\"']?(?:[\w.]+\[|None\s*\|\s*)*(?:[\w.]+\.)?Library\b"
    rb"|\b(?:Library|_scoped_library)\([^\n]*\)\s+as\s+(\w+)",
    re.MULTILINE,
)
_OPS = re.compile(rb"^([A-Za-z_]\w*)" + _ANNOTATION + rb"(?:[\w.]*\.)?ops\b\s*(?:[#;]|$)", re.MULTILINE)


@dataclass(frozen=True)
class Shared:
    """What the files of a package share.

    ``libraries`` are names of a ``Library`` in any file, ``ops`` those of modules that stand for ``torch.ops``,
    ``tops`` the first parts of the names under which the package's own modules are imported, ``given`` full names in
    the package with those of PyTorch's that they stand for, and ``torch`` is whether what the package's modules call
    ``torch`` is PyTorch itself.
    """

    libraries: frozenset[str] = frozenset()
    ops: frozenset[str] = frozenset()
    tops: frozenset[str] = frozenset()
    given: Mapping[str, frozenset[str]] = field(default_factory=dict)
    torch: bool = True

    def own(self, name: str) -> bool:
        """Whether a full name, as an import has it, is of the package."""
        return name.startswith(".") or name.partition(".")[0] in self.tops

    @cached_property
    def words(self) -> frozenset[str]:
        """Names that mean something in whichever file they are imported to."""
        return self.libraries | self.ops | {name.rpartition(".")[2] for name in self.given}


def shared(files: Sequence[SourceFile], layout: Layout) -> Shared:
    """What the files of a package share."""
    # To Python a lone carriage return ends a line as well.
    sources = [file.data.replace(b"\r", b"\n") for file in files if file.path.endswith(".py")]
    return Shared(
        frozenset(
            match[match.lastindex or 0].decode("ascii")
            for data in sources
            if b"Library" in data or b"_scoped_library" in data
            for match in _LIBRARY.finditer(data)
        ),
        frozenset(name.decode("ascii") for data in sources for name in _OPS.findall(data)),
        layout.tops,
        handed_on(files, layout),
        not any("torch" in layout.module_at(file.path).split(".")[1:] for file in files),
    )
