"""A kernel's description as a value, and the terms that it is written in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

EDITION = 5
BACKENDS = ("cann", "cpu", "cuda", "metal", "neuron", "rocm", "tpu", "xpu")
_GPUS = {"cuda", "rocm", "xpu"}
DEFAULT_PYEXT = ("py", "pyi")

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class KernelDependency:
    """Another kernel that this one loads: by ``version``, or by ``revision``."""

    repo_id: str
    version: int | None
    revision: str | None


@dataclass(frozen=True)
class BackendSpec:
    """One backend the kernel is built for, with what it needs beyond the kernel's general dependencies."""

    name: str
    python_depends: tuple[str, ...]
    kernel_depends: tuple[KernelDependency, ...]
    archs: tuple[str, ...] | None


@dataclass(frozen=True)
class Spec:
    """A checked ``build.toml``, or the same said of a package inside some project.

    ``python_depends`` holds for every variant; each ``BackendSpec`` has its own on top. ``kernel_depends``
    of a backend already includes the general ones. Of a package elsewhere than under ``torch-ext``,
    ``source_dir`` is the directory, ``package`` its dotted name and ``include`` lists files and directories
    of the project that ship with it. ``universal`` asks for ``torch-universal`` whatever the backends.
    """

    root: Path
    name: str
    version: int
    license: str
    backends: tuple[BackendSpec, ...]
    python_depends: tuple[str, ...] = ()
    repo_id: str | None = None
    pyext: tuple[str, ...] = DEFAULT_PYEXT
    upstream: str | None = None
    source: str | None = None
    source_dir: Path | None = None
    package: str | None = None
    include: tuple[str, ...] = ()
    universal: bool = False

    @property
    def has_universal(self) -> bool:
        """True if ``torch-universal``, which loaders take on any machine, is built.

        Unless it is asked for, that needs sources which run on any machine: on a CPU, or on every GPU.
        """
        names = {backend.name for backend in self.backends}
        return self.universal or "cpu" in names or names >= _GPUS

    @property
    def python_name(self) -> str:
        """The name under which Python imports the package."""
        return self.name.replace("-", "_")

    @property
    def package_dir(self) -> Path:
        """The directory of the kernel package."""
        return self.source_dir or self.root / "torch-ext" / self.python_name

    @property
    def package_name(self) -> str:
        """The dotted name under which the package imports itself in place."""
        return self.package or self.python_name

    @property
    def import_root(self) -> Path:
        """The directory that the first part of the package's name stands in."""
        return self.package_dir.absolute().parents[self.package_name.count(".")]


def is_repo_id(text: str) -> bool:
    """True if ``text`` has the form of a repository's id on the Hub, ``org/name``."""
    return (
        _REPO_ID.fullmatch(text) is not None
        and len(text) <= 96
        and not any(
            part.endswith((".", "-", ".git")) or ".." in part or "--" in part for part in text.split("/")
        )
    )
