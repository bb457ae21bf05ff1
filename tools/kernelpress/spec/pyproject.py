"""A kernel that is a package inside some project: described by options, or under [tool.kernelpress]."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from email.parser import HeaderParser
from keyword import iskeyword
from pathlib import Path
from typing import Any

import tomli
import tomlkit

from kernelpress.errors import SpecError
from kernelpress.spec.document import read_document
from kernelpress.spec.model import DEFAULT_PYEXT, EDITION, Spec
from kernelpress.spec.upstream import with_kernel_dependencies
from kernelpress.spec.validate import validate

PYPROJECT = "pyproject.toml"
# Those that PyTorch and Triton serve from the same Python sources.
_BACKENDS = ["cpu", "cuda", "rocm", "xpu"]
_OWN_KINDS: dict[str, type] = {
    "source-dir": str,
    "package": str,
    "include": list,
    "repo-id": str,
    "pyext": list,
    "universal": bool,
}
_KIND_NAMES = {str: "a string", list: "a list of strings", bool: "true or false"}
_OWN = tuple(_OWN_KINDS)
_GENERAL = (
    "name",
    "version",
    "license",
    "backends",
    "python-depends",
    "kernel-depends",
    "upstream",
    "source",
)


def load_project(
    directory: Path,
    *,
    source_dir: Path | None = None,
    package: str | None = None,
    name: str | None = None,
    license: str | None = None,
    include: Sequence[str] = (),
) -> Spec:
    """Describe a kernel that is a package of some project.

    What is not given comes from ``[tool.kernelpress]`` of ``directory``'s pyproject.toml, and the licence, where
    that is silent too, from what the project says of itself.

    Args:
        directory: Where the build goes, and where pyproject.toml is looked for.
        source_dir: The package's directory.
        package: The package's dotted name.
        name: The kernel's name on the Hub.
        license: An SPDX identifier.
        include: Files and directories of the project that ship with the package.

    Raises:
        SpecError: Something needed is said nowhere, or is wrong; with file and line where there is one.
    """
    path, text, table, project = _pyproject(directory)
    _check_keys(table, path)
    if source_dir is None and "source-dir" in table:
        source_dir = directory / table["source-dir"]
    package = package or table.get("package")
    if source_dir is None or package is None:
        raise SpecError(
            "the package is not named; give --source-dir and --package, or `source-dir` and `package` in "
            "[tool.kernelpress]",
            path=path,
        )
    parts = tuple(package.split("."))
    if not all(part.isidentifier() and not iskeyword(part) for part in parts):
        raise SpecError(
            f"{package!r} is no dotted name of a package; write it as Python imports it", path=path
        )
    if source_dir.absolute().parts[-len(parts) :] != parts:
        raise SpecError(
            f"{source_dir} does not end in {'/'.join(parts)}, so Python cannot import it as {package}; "
            "correct --source-dir or --package"
        )
    general: dict[str, Any] = {
        "version": 1,
        "backends": _BACKENDS,
        **{key: value for key, value in table.items() if key in _GENERAL},
        "edition": EDITION,
    }
    general["name"] = name or table.get("name") or re.sub(r"[._]+", "-", parts[-1])
    if license is not None:
        general["license"] = license
    if "license" not in general:
        general["license"] = _license(project, source_dir)
    if "repo-id" in table:
        general["hub"] = {"repo-id": table["repo-id"]}
    document = {"general": general, "torch-noarch": {"pyext": table.get("pyext", list(DEFAULT_PYEXT))}}
    spec = _check_by_upstream(validate(path, text, document), path, document)
    return replace(
        spec,
        root=directory,
        source_dir=source_dir.absolute(),
        package=package,
        include=(*table.get("include", ()), *include),
        universal=table.get("universal", False),
    )


def asks_for_universal(directory: Path) -> bool:
    """True if ``[tool.kernelpress]`` has ``universal = true``; beside a build.toml too, whose form upstream decides.

    Raises:
        SpecError: The table has another key that is unknown, or of the wrong kind.
    """
    if not describes_kernel(directory):
        return False
    path, _, table, _ = _pyproject(directory)
    _check_keys(table, path)
    return bool(table.get("universal", False))


def describes_kernel(directory: Path) -> bool:
    """True if the directory's pyproject.toml can be read and has a table ``[tool.kernelpress]``."""
    try:
        return "kernelpress" in tomli.loads((directory / PYPROJECT).read_text("utf-8")).get("tool", {})
    except (OSError, ValueError, RecursionError):
        return False


def _check_keys(table: dict[str, Any], path: Path) -> None:
    for key in table:
        if key not in (*_OWN, *_GENERAL):
            raise SpecError(
                f"unknown key `{key}` in [tool.kernelpress]; known are {', '.join(sorted((*_OWN, *_GENERAL)))}",
                path=path,
            )
    for key, kind in _OWN_KINDS.items():
        if key in table and not _is(table[key], kind):
            raise SpecError(
                f"`{key}` in [tool.kernelpress] must be {_KIND_NAMES[kind]}, not {table[key]!r}", path=path
            )


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and (
        not isinstance(value, list) or all(isinstance(item, str) for item in value)
    )


def _check_by_upstream(spec: Spec, path: Path, document: dict[str, Any]) -> Spec:
    """Let the Kernel Hub's parser, which reads a build.toml, read the same description."""
    with tempfile.TemporaryDirectory(prefix="kernelpress-spec-") as folder:
        Path(folder, "build.toml").write_text(tomlkit.dumps(document), "utf-8")
        return with_kernel_dependencies(spec, path, Path(folder))


def _pyproject(directory: Path) -> tuple[Path, str, dict[str, Any], dict[str, Any]]:
    """The path and text of a pyproject.toml, ``[tool.kernelpress]`` and ``[project]``; empty where there is no file."""
    path = directory / PYPROJECT
    try:
        text, document = read_document(path)
    except FileNotFoundError:
        return path, "", {}, {}
    # Lines are looked up by the names that build.toml has for these tables.
    text = text.replace("[tool.kernelpress]", "[general]")
    tool, project = document.get("tool", {}), document.get("project", {})
    table = tool.get("kernelpress", {}) if isinstance(tool, dict) else {}
    for name, value in (("tool", tool), ("tool.kernelpress", table), ("project", project)):
        if not isinstance(value, dict):
            raise SpecError(f"`{name}` must be a table; write it as [{name}]", path=path)
    return path, text, table, project


def _license(project: dict[str, Any], source_dir: Path) -> str:
    """The licence that the project around a package states: in its pyproject.toml, or when it was installed."""
    stated = project.get("license")
    for folder in source_dir.absolute().parents:
        if isinstance(stated, str):
            return stated
        if (folder / PYPROJECT).is_file():
            stated = _pyproject(folder)[3].get("license")
            continue
        top = source_dir.absolute().relative_to(folder).parts[0]
        for metadata in sorted(folder.glob("*.dist-info/METADATA")):
            # A directory of several installed projects: only the one that brought the package counts.
            record = metadata.with_name("RECORD")
            if record.is_file() and f"\n{top}/" in "\n" + record.read_text("utf-8"):
                stated = HeaderParser().parsestr(metadata.read_text("utf-8"))["License-Expression"]
    if isinstance(stated, str):
        return stated
    raise SpecError("the licence is not named; give --license with an SPDX identifier such as 'Apache-2.0'")
