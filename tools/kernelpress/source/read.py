"""Reading of a kernel package: its files, as they ship, and the state of the repository they are in."""

from __future__ import annotations

import ast
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kernelpress.conventions import METADATA, OPS_MODULE, SIGNATURE
from kernelpress.errors import SourceError
from kernelpress.source.card import CARD_TEMPLATE, read_card
from kernelpress.source.file import read_file
from kernelpress.source.git import GitState, git_state
from kernelpress.source.module_map import VENDOR, ModuleMap
from kernelpress.source.vendor import vendor
from kernelpress.spec.model import Spec
from kernelpress.spec.pyproject import PYPROJECT, describes_kernel
from kernelpress.syntax.source_file import SourceFile, garbage_collection_paused

# Written into every variant by the build, so a source of that name would be lost without a word.
_RESERVED = (METADATA, SIGNATURE)
_HELPER = "add_op_namespace_prefix"
_TORCH_OPS = ("torch.ops.", "getattr(torch.ops,")
_OPS_PACKAGE = OPS_MODULE.removesuffix(".py") + "/"


@dataclass(frozen=True)
class Source:
    """The package's files in order of their paths, the card's template and pictures, and git's view of all."""

    package_dir: Path
    files: tuple[SourceFile, ...]
    card: str | None
    pictures: dict[str, bytes]
    git: GitState | None
    module_map: ModuleMap


@garbage_collection_paused()
def read_source(spec: Spec) -> Source:
    """Read every file of the kernel package that ships.

    Caches, bytecode, hidden files and whatever has none of the spec's suffixes stay behind. So does an
    ``_ops.py`` that was generated, or stands in for one: the build generates one for each variant.

    Raises:
        SourceError: The package is missing or is no package, holds a file that is not valid Python or
            not UTF-8, a link that leaves it, or a name that the build needs for itself.
    """
    package = spec.package_dir
    if not package.is_dir():
        name = "of this name" if spec.source_dir else f"torch-ext/{spec.python_name}"
        raise SourceError(f"there is no package directory {name}; create it", path=package)
    if spec.source_dir is None and not package.resolve().is_relative_to(spec.root.resolve()):
        raise SourceError(
            "the package directory is a link that leaves the project; move the files here", path=package
        )
    suffixes = tuple(f".{suffix}" for suffix in spec.pyext)
    paths = {path.relative_to(package).as_posix(): path for path in _walk(package, suffixes)}
    if "__init__.py" not in paths:
        raise SourceError("there is no __init__.py here, so this is no Python package; add one", path=package)
    for name in _RESERVED:
        if name in paths:
            raise SourceError(
                "the build writes a file of this name itself; rename this one", path=paths[name]
            )
    own = {name: read_file(path, name) for name, path in paths.items()}
    for name, file in own.items():
        if name.startswith(_OPS_PACKAGE) or (name == OPS_MODULE and not _is_generated(file.tree, own)):
            raise SourceError(
                f"the build writes a module of this name itself, with `ops` and `{_HELPER}` alone; rename this one",
                path=paths[name],
            )
    module_map, vendored = vendor(
        spec.include, spec.package_name, (spec.import_root, spec.root.absolute()), own.values()
    )
    if vendored and any(name.startswith(f"{VENDOR}/") or name == f"{VENDOR}.py" for name in own):
        raise SourceError(f"`include` needs the name {VENDOR} for itself; rename this", path=package / VENDOR)
    files = [file for name, file in own.items() if name != OPS_MODULE] + vendored
    inputs = {file.origin: file.data for file in (*own.values(), *vendored) if file.origin is not None}
    card, pictures = read_card(spec.root)
    if spec.source_dir is None:
        inputs |= {path: path.read_bytes() for path in _other_inputs(spec.root)}
        inputs |= {spec.root / name: data for name, data in pictures.items()}
    return Source(
        package_dir=package,
        files=tuple(sorted(files, key=lambda file: file.path)),
        card=card,
        pictures=pictures,
        git=git_state(spec.import_root if spec.source_dir else spec.root, inputs, (package, suffixes)),
        module_map=module_map,
    )


def _is_generated(ops_module: ast.Module, files: Mapping[str, SourceFile]) -> bool:
    """True if an ``_ops.py`` holds what a build generates, or a stand-in for it, so that nothing is lost with it.

    Of the package's files it imports none: that might register operators. kernel-builder's imports a compiled module.
    """
    helpers = 0
    for node in ops_module.body:
        match node:
            case ast.FunctionDef(name=name) if name == _HELPER:
                helpers += 1
            case ast.Assign(targets=[ast.Name("ops")], value=value) if ast.unparse(value).startswith(
                _TORCH_OPS
            ):
                pass
            case (
                ast.Assign(targets=[ast.Name(name)], value=ast.Constant())
                | ast.AnnAssign(target=ast.Name(name), value=ast.Constant())
            ) if name.startswith("_") and not _is_taken(name, files):
                pass
            case ast.ImportFrom(module=None, level=1, names=[ast.alias(name)]) if not (
                f"{name}.py" in files or f"{name}/__init__.py" in files
            ):
                pass
            case ast.Import(names=[ast.alias("torch")]) | ast.ImportFrom(module="__future__" | "typing"):
                pass
            case ast.Expr(ast.Constant()):
                pass
            case _:
                return False
    return helpers == 1


def _is_taken(name: str, files: Mapping[str, SourceFile]) -> bool:
    """True if a module that names ``_ops`` has the name of one of its values, too."""
    words = [re.compile(rb"\b%s\b" % word) for word in (b"_ops", name.encode("utf-8"))]
    return any(
        path != OPS_MODULE and all(word.search(file.data) for word in words) for path, file in files.items()
    )


def _walk(package: Path, suffixes: tuple[str, ...]) -> list[Path]:
    def unreadable(error: OSError) -> None:
        raise SourceError(f"cannot be read: {error.strerror}", path=error.filename)

    paths = []
    top = package.resolve()
    for folder, directories, names in os.walk(package, onerror=unreadable):
        directories[:] = [name for name in directories if not _hidden(name)]
        for name in directories:
            if (path := Path(folder, name)).is_symlink():
                raise SourceError("a linked directory cannot ship; put the files themselves here", path=path)
        for name in names:
            path = Path(folder, name)
            if _hidden(name) or not name.endswith(suffixes):
                continue
            if not _is_utf8(path.relative_to(package).as_posix()):
                shown = (
                    path.as_posix().encode("utf-8", "backslashreplace").decode("ascii", "backslashreplace")
                )
                raise SourceError("this name is not UTF-8, so the Hub cannot keep it; rename it", path=shown)
            if path.is_symlink() and not path.resolve().is_relative_to(top):
                raise SourceError("this link leaves the package; put the file itself here", path=path)
            try:
                regular = stat.S_ISREG(path.stat().st_mode)
            except OSError as error:
                raise SourceError(f"cannot be read: {error.strerror}", path=path) from None
            if not regular:
                raise SourceError("not a regular file; remove it from the package", path=path)
            paths.append(path)
    return paths


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _hidden(name: str) -> bool:
    # Editors leave `#name#` and `name~` behind; the latter never has a suffix that ships.
    return name.startswith((".", "#")) or name == "__pycache__"


def _other_inputs(root: Path) -> list[Path]:
    """The kernel's inputs other than the package."""
    names = ["build.toml", CARD_TEMPLATE, *([PYPROJECT] if describes_kernel(root) else [])]
    return [path for name in names if (path := root / name).is_file()]
