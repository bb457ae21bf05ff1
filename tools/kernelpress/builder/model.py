"""A build as a value: the variants of a kernel with all their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kernelpress.findings.model import Finding
from kernelpress.source.read import Source
from kernelpress.spec.model import Spec
from kernelpress.syntax.imports import Import


@dataclass(frozen=True)
class VariantFile:
    """One file of a variant: its path there (with forward slashes) and its content."""

    path: str
    data: bytes


@dataclass(frozen=True)
class Variant:
    """A directory of ``build/``. ``id`` is both the module's name and the namespace of its operators."""

    name: str
    id: str
    files: tuple[VariantFile, ...]


@dataclass(frozen=True)
class Build:
    """Every variant of a kernel, and the sources it is made of.

    ``content_hash`` tells builds apart that may be loaded in one process: it covers what ships, but not the
    commit. ``tree_hash`` covers every byte of every variant, except provenance. ``findings`` are those of the rules
    on sources, found in the very files that this build holds, and ``outside`` the imports of other packages, with the
    files that hold them.
    """

    spec: Spec
    source: Source
    directory: Path
    variants: tuple[Variant, ...]
    content_hash: str
    tree_hash: str
    findings: tuple[Finding, ...] = ()
    outside: tuple[tuple[Path, Import], ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that forbid publishing, whatever is forced."""
        return tuple(finding for finding in self.findings if finding.severity == "error")
