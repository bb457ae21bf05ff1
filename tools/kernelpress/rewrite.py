"""Third step: sources in which the op namespace is left open, so that each variant can have its own.

Every edit replaces one name within a line and nothing else, at a place found on the syntax tree. What has
nothing to edit therefore stays byte for byte the same, and no line moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernelpress.sites import Edit, Found, error_at, find, library_names
from kernelpress.source import SourceFile

# PyTorch's own: a package may extend them, but they are never its own to rename.
_FOREIGN = frozenset(
    (
        "aten",
        "prim",
        "prims",
        "quantized",
        "c10d",
        "_c10d_functional",
        "inductor",
        "torchvision",
        "torchaudio",
    )
)


@dataclass(frozen=True)
class RewrittenFile:
    """A file cut at every place where the op namespace goes.

    ``chunks`` are the pieces in between: a file without operators is a single one.
    """

    path: str
    chunks: tuple[bytes, ...]

    def render(self, namespace: str) -> bytes:
        """The file with ``namespace`` in every place that is left open."""
        return namespace.encode("ascii").join(self.chunks)


@dataclass(frozen=True)
class Rewritten:
    """All files of the package, and the namespaces under which it registers operators in place."""

    files: tuple[RewrittenFile, ...]
    namespaces: tuple[str, ...]


def rewrite(files: Sequence[SourceFile], package: str, package_dir: Path) -> Rewritten:
    """Leave the op namespace open and make imports of the package by its own name relative.

    Args:
        files: The package's files.
        package: The name under which the package imports itself in place.
        package_dir: Where the files stand, for messages.

    Raises:
        SourceError: A namespace that is only known when the code runs, or two operators of one name that
            would come to stand in the same namespace; with file and line.
    """
    libraries = library_names(files)
    found = [find(file, package, package_dir, libraries) for file in files]
    own = {site.namespace for each in found for site in each.sites if site.creates} - _FOREIGN
    _refuse_clashes(found, own, package_dir)
    if own:
        for each in found:
            for offset in each.escapes:
                raise error_at(
                    each.file,
                    package_dir,
                    offset,
                    "torch.ops is passed on, which hides the namespace that is "
                    'used; write `torch.ops.<namespace>` or `getattr(torch.ops, "<namespace>")` here',
                )
    return Rewritten(
        files=tuple(RewrittenFile(each.file.path, _cut(each, own)) for each in found),
        namespaces=tuple(sorted(own)),
    )


def _cut(found: Found, own: set[str]) -> tuple[bytes, ...]:
    edits = {Edit(site.start, site.end, None) for site in found.sites if site.namespace in own}
    chunks, piece, at = [], b"", 0
    for edit in sorted([*edits, *found.imports], key=lambda edit: edit.start):
        piece += found.file.data[at : edit.start]
        if edit.text is None:
            chunks.append(piece)
            piece = b""
        else:
            piece += edit.text
        at = edit.end
    return (*chunks, piece + found.file.data[at:])


def _refuse_clashes(found: Iterable[Found], own: set[str], package_dir: Path) -> None:
    """Several namespaces become one, so their operators must differ in name."""
    first: dict[str, str] = {}
    for each in found:
        for site in each.sites:
            if not (site.creates and site.op and site.namespace in own):
                continue
            if first.setdefault(site.op, site.namespace) != site.namespace:
                raise error_at(
                    each.file,
                    package_dir,
                    site.start,
                    f"operator {site.op!r} is defined in {first[site.op]!r} and in {site.namespace!r}, which "
                    "become one namespace in the build; rename one of them",
                )
