"""Reads the description of a kernel, checked before any source is read or anything is written."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli

from kernelpress.errors import SpecError
from kernelpress.spec.document import read_document
from kernelpress.spec.editions import upgrade
from kernelpress.spec.model import EDITION, Spec
from kernelpress.spec.pyproject import PYPROJECT, asks_for_universal, describes_kernel, load_project
from kernelpress.spec.upstream import with_kernel_dependencies
from kernelpress.spec.validate import validate

BUILD_TOML = "build.toml"


@dataclass(frozen=True)
class KernelOptions:
    """A kernel by the command line's options: a directory with a description, or a package anywhere.

    Args:
        directory: The directory of build.toml or pyproject.toml.
        source_dir, package, name, license, include: As for ``load_project``.
    """

    directory: Path = Path()
    source_dir: Path | None = None
    package: str | None = None
    name: str | None = None
    license: str | None = None
    include: tuple[str, ...] = ()

    def describes(self) -> bool:
        """True if there is a description: an option, or a file that may hold one."""
        return self.source_dir is not None or any(
            (self.directory / name).exists() for name in (BUILD_TOML, PYPROJECT)
        )

    def load(self) -> Spec:
        """Read the description.

        Raises:
            SpecError: It is missing or wrong, or an option is given that goes with others.
        """
        if self.source_dir is not None or self.package is not None:
            return load_project(
                self.directory,
                source_dir=self.source_dir,
                package=self.package,
                name=self.name,
                license=self.license,
                include=self.include,
            )
        for option, value in (("name", self.name), ("license", self.license), ("include", self.include)):
            if value:
                raise SpecError(f"--{option} goes with --source-dir and --package; give these too")
        return load_spec(self.directory)


def load_spec(directory: Path) -> Spec:
    """Read and check ``build.toml``, of today's edition or an older one without compiled parts.

    Args:
        directory: The directory that holds ``build.toml``.

    Raises:
        SpecError: The file is missing or malformed, or asks for something that kernelpress or the Kernel
            Hub's own parser does not accept; with the line wherever there is one.
    """
    path = directory / BUILD_TOML
    if not path.exists() and describes_kernel(directory):
        return load_project(directory)
    try:
        text, document = read_document(path)
    except FileNotFoundError:
        raise SpecError(
            "there is no build.toml here; name the directory of a kernel", path=directory
        ) from None
    upgraded = _upgraded(path, text, document)
    if upgraded is None:
        spec = with_kernel_dependencies(validate(path, text, document), path)
    else:
        with tempfile.TemporaryDirectory(prefix="kernelpress-spec-") as folder:
            Path(folder, path.name).write_text(upgraded, "utf-8")
            spec = with_kernel_dependencies(validate(path, text, tomli.loads(upgraded)), path, Path(folder))
    return replace(spec, universal=asks_for_universal(directory))


def _upgraded(path: Path, text: str, document: dict[str, Any]) -> str | None:
    """An older build.toml as it is today, if that needs nothing that only its author knows."""
    general = document.get("general")
    if not isinstance(general, dict) or general.get("edition") == EDITION:
        return None
    if "edition" in general and type(general["edition"]) is not int:
        return None
    try:
        return upgrade(text, path)
    except SpecError:
        # Reading the file as it stands says why, with the line.
        return None
