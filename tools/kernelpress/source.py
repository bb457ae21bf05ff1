"""Second step: the files of a kernel package, as they ship, and the state of the repository they are in."""

from __future__ import annotations

import ast
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

from kernelpress.errors import SourceError
from kernelpress.provenance import GitState, git_state
from kernelpress.spec import Spec

# Written into every variant by the build, so a source of that name would be lost without a word.
RESERVED = ("metadata.json", "metadata.json.sigstore")
OPS_MODULE = "_ops.py"


@dataclass(frozen=True)
class SourceFile:
    """One file that ships: its path in the package (with forward slashes) and its content."""

    path: str
    data: bytes


@dataclass(frozen=True)
class Source:
    """The package's files in order of their paths, the card's template, and git's view of both."""

    package_dir: Path
    files: tuple[SourceFile, ...]
    card: str | None
    git: GitState | None


def read_source(spec: Spec) -> Source:
    """Read every file of the kernel package that ships.

    Caches, bytecode, hidden files and whatever has none of the spec's suffixes stay behind. So does an
    ``_ops.py`` of the package's own: the build generates one for each variant.

    Raises:
        SourceError: The package is missing or is no package, holds a file that is not valid Python or
            not UTF-8, a link that leaves it, or a name that the build needs for itself.
    """
    package = spec.package_dir
    if not package.is_dir():
        raise SourceError(
            f"there is no package directory torch-ext/{spec.python_name}; create it", path=package
        )
    if not package.resolve().is_relative_to(spec.root.resolve()):
        raise SourceError(
            "the package directory is a link that leaves the project; move the files here", path=package
        )
    suffixes = tuple(f".{suffix}" for suffix in spec.pyext)
    found = {path.relative_to(package).as_posix(): path for path in _walk(package, suffixes)}
    if "__init__.py" not in found:
        raise SourceError("there is no __init__.py here, so this is no Python package; add one", path=package)
    for name in RESERVED:
        if name in found:
            raise SourceError(
                "the build writes a file of this name itself; rename this one", path=found[name]
            )
    read = {path: _read(path) for path in found.values()}
    for path, data in read.items():
        if path.suffix in (".py", ".pyi"):
            _check_syntax(path, data)
    inputs = read | {path: path.read_bytes() for path in _beside(spec.root)}
    return Source(
        package_dir=package,
        files=tuple(SourceFile(name, read[found[name]]) for name in sorted(found) if name != OPS_MODULE),
        card=_card(spec.root),
        git=git_state(spec.root, inputs, (package, suffixes)),
    )


def parse(data: bytes, filename: str = "<source>") -> ast.Module:
    """The syntax tree of a Python source, without the warnings that the author gets from Python anyway.

    Raises:
        SyntaxError: This is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(data, filename)


def _walk(package: Path, suffixes: tuple[str, ...]) -> list[Path]:
    def unreadable(error: OSError) -> None:
        raise SourceError(f"cannot be read: {error.strerror}", path=error.filename)

    found = []
    inside = package.resolve()
    for folder, directories, names in os.walk(package, onerror=unreadable):
        directories[:] = [name for name in directories if not _hidden(name)]
        for name in directories:
            if (path := Path(folder, name)).is_symlink():
                raise SourceError("a linked directory cannot ship; put the files themselves here", path=path)
        for name in names:
            path = Path(folder, name)
            if _hidden(name) or not name.endswith(suffixes):
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise SourceError("this link leaves the package; put the file itself here", path=path)
            try:
                regular = stat.S_ISREG(path.stat().st_mode)
            except OSError as error:
                raise SourceError(f"cannot be read: {error.strerror}", path=path) from None
            if not regular:
                raise SourceError("not a regular file; remove it from the package", path=path)
            found.append(path)
    return found


def _hidden(name: str) -> bool:
    # Editors leave `#name#` and `name~` behind; the latter never has a suffix that ships.
    return name.startswith((".", "#")) or name == "__pycache__"


def _read(path: Path) -> bytes:
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


def _beside(root: Path) -> list[Path]:
    """The kernel's inputs other than the package."""
    return [path for name in ("build.toml", "CARD.md") if (path := root / name).is_file()]


def _card(root: Path) -> str | None:
    path = root / "CARD.md"
    if not path.is_file():
        return None
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise SourceError("not UTF-8; save the file in that encoding", path=path) from None
