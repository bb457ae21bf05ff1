"""First step: what ``build.toml`` asks for, checked before anything is read or written."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from kernelpress.errors import SpecError

EDITION = 5
BACKENDS = ("cann", "cpu", "cuda", "metal", "neuron", "rocm", "tpu", "xpu")
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
    of the project that ship with it.
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

    @property
    def python_name(self) -> str:
        """The name under which Python imports the package."""
        return self.name.replace("-", "_")

    @property
    def package_dir(self) -> Path:
        """Where the kernel package stands."""
        return self.source_dir or self.root / "torch-ext" / self.python_name

    @property
    def package_name(self) -> str:
        """The dotted name under which the package imports itself in place."""
        return self.package or self.python_name

    @property
    def import_root(self) -> Path:
        """The directory that the first part of the package's name stands in."""
        return self.package_dir.absolute().parents[self.package_name.count(".")]


def load_spec(directory: Path) -> Spec:
    """Read and check ``build.toml``, of today's edition or an older one without compiled parts.

    Args:
        directory: The directory that holds ``build.toml``.

    Raises:
        SpecError: The file is missing or malformed, or asks for something that kernelpress or the Kernel
            Hub's own parser does not accept; with the line wherever there is one.
    """
    path = directory / "build.toml"
    if not path.exists() and _has_table(directory / "pyproject.toml"):
        from kernelpress.project import load_project

        return load_project(directory)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise SpecError(
            "there is no build.toml here; name the directory of a kernel", path=directory
        ) from None
    except UnicodeDecodeError as error:
        raise SpecError(f"not UTF-8 (byte {error.start})", path=path) from None
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", path=path) from None
    try:
        document = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise SpecError(f"malformed TOML: {error.msg}", path=path, line=error.lineno) from None
    except RecursionError as error:
        raise SpecError(f"malformed TOML: {error}", path=path) from None
    newer = _in_todays_edition(path, text, document)
    if newer is None:
        return with_kernel_dependencies(read_document(path, text, document), path)
    with tempfile.TemporaryDirectory(prefix="kernelpress-spec-") as folder:
        Path(folder, path.name).write_text(newer, "utf-8")
        return with_kernel_dependencies(read_document(path, text, tomli.loads(newer)), path, Path(folder))


def _in_todays_edition(path: Path, text: str, document: dict[str, Any]) -> str | None:
    """An older build.toml as it is today, if that needs nothing that only its author knows."""
    general = document.get("general")
    if not isinstance(general, dict) or general.get("edition") == EDITION:
        return None
    if "edition" in general and type(general["edition"]) is not int:
        return None
    from kernelpress.migrate import upgraded

    try:
        return upgraded(text, path)
    except SpecError:
        # Reading the file as it stands says why, with the line.
        return None


def read_document(path: Path, text: str, document: dict[str, Any]) -> Spec:
    """Check a document of build.toml's form that need not be one.

    Args:
        path: The file to name in messages; its directory becomes the spec's root.
        text: What that file holds, to find lines in.
        document: The document.

    Raises:
        SpecError: As ``load_spec``, less what only the Kernel Hub's own parser finds.
    """
    from kernelpress.spec_reader import Reader

    return Reader(path, text, document).read()


def _has_table(pyproject: Path) -> bool:
    try:
        return "kernelpress" in tomli.loads(pyproject.read_text("utf-8")).get("tool", {})
    except (OSError, ValueError, RecursionError):
        return False


def is_repo_id(text: str) -> bool:
    """Whether ``text`` has the form of a repository's id on the Hub, ``org/name``."""
    return (
        _REPO_ID.fullmatch(text) is not None
        and len(text) <= 96
        and not any(
            part.endswith((".", "-", ".git")) or ".." in part or "--" in part for part in text.split("/")
        )
    )


def with_kernel_dependencies(spec: Spec, path: Path, folder: Path | None = None) -> Spec:
    """Let the Kernel Hub's own parser have the last word, and take from it what it alone understands.

    Args:
        spec: What was read.
        path: The file to name in messages.
        folder: Where the build.toml stands that the parser reads; the spec's root by default.

    Raises:
        SpecError: The parser refuses it.
    """
    from dataclasses import replace

    from kernels._rust import Backend, Build, KernelVersion  # type: ignore[import-untyped]

    try:
        build = Build.open(folder or spec.root)
    except ValueError as error:
        reason = str(error).strip().rpartition("build.toml: ")[2]
        raise SpecError(f"the Kernel Hub's parser refuses this file: {reason}", path=path) from None

    def depends(backend: str) -> tuple[KernelDependency, ...]:
        found = build.all_kernel_depends(Backend.from_str(backend))
        return tuple(
            KernelDependency(each.repo_id, each.version.version, None)
            if isinstance(each.version, KernelVersion.Version)
            else KernelDependency(each.repo_id, None, each.version.revision)
            for each in found
        )

    return replace(
        spec, backends=tuple(replace(each, kernel_depends=depends(each.name)) for each in spec.backends)
    )
