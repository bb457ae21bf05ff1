"""A kernel that is a package inside some project: described by options, or under [tool.kernelpress]."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import tomli
import tomlkit

from kernelpress.errors import SpecError
from kernelpress.spec import DEFAULT_PYEXT, EDITION, Spec, read_document, with_kernel_dependencies

PYPROJECT = "pyproject.toml"
# Those that PyTorch and Triton serve from the same Python sources.
_BACKENDS = ["cpu", "cuda", "rocm", "xpu"]
_OWN_KINDS: dict[str, type] = {
    "source-dir": str,
    "package": str,
    "include": list,
    "repo-id": str,
    "pyext": list,
}
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
    for key in table:
        if key not in (*_OWN, *_GENERAL):
            raise SpecError(
                f"unknown key `{key}` in [tool.kernelpress]; known are {', '.join(sorted((*_OWN, *_GENERAL)))}",
                path=path,
            )
    for key, kind in _OWN_KINDS.items():
        if key in table and not _is(table[key], kind):
            what = "a list of strings" if kind is list else "a string"
            raise SpecError(f"`{key}` in [tool.kernelpress] must be {what}, not {table[key]!r}", path=path)
    where = source_dir or (directory / table["source-dir"] if "source-dir" in table else None)
    dotted = package or table.get("package")
    if where is None or dotted is None:
        raise SpecError(
            "the package is not named; give --source-dir and --package, or `source-dir` and `package` in "
            "[tool.kernelpress]",
            path=path,
        )
    if not all(part.isidentifier() for part in str(dotted).split(".")):
        raise SpecError(
            f"{dotted!r} is no dotted name of a package; write it as Python imports it", path=path
        )
    if Path(where).absolute().parts[-len(dotted.split(".")) :] != tuple(dotted.split(".")):
        raise SpecError(
            f"{where} does not end in {dotted.replace('.', '/')}, so Python cannot import it as {dotted}; "
            "correct --source-dir or --package"
        )
    general: dict[str, Any] = {
        "version": 1,
        "backends": _BACKENDS,
        **{key: value for key, value in table.items() if key in _GENERAL},
        "edition": EDITION,
    }
    general["name"] = name or table.get("name") or re.sub(r"[._]+", "-", dotted.rpartition(".")[2])
    if license is not None:
        general["license"] = license
    if "license" not in general:
        general["license"] = _license(project, Path(where))
    if "repo-id" in table:
        general["hub"] = {"repo-id": table["repo-id"]}
    document = {"general": general, "torch-noarch": {"pyext": table.get("pyext", list(DEFAULT_PYEXT))}}
    spec = _last_word(read_document(path, text, document), path, document)
    listed = [*table.get("include", ()), *include]
    return replace(
        spec, root=directory, source_dir=Path(where).absolute(), package=dotted, include=tuple(listed)
    )


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and (
        not isinstance(value, list) or all(isinstance(each, str) for each in value)
    )


def _last_word(spec: Spec, path: Path, document: dict[str, Any]) -> Spec:
    """What the Kernel Hub's parser, which reads a build.toml, makes of the same description."""
    with tempfile.TemporaryDirectory(prefix="kernelpress-spec-") as folder:
        Path(folder, "build.toml").write_text(tomlkit.dumps(document), "utf-8")
        return with_kernel_dependencies(spec, path, Path(folder))


def _pyproject(directory: Path) -> tuple[Path, str, dict[str, Any], dict[str, Any]]:
    path = directory / PYPROJECT
    try:
        text = path.read_bytes().decode("utf-8")
        document = tomli.loads(text)
    except FileNotFoundError:
        return path, "", {}, {}
    except UnicodeDecodeError as error:
        raise SpecError(f"not UTF-8 (byte {error.start})", path=path) from None
    except tomli.TOMLDecodeError as error:
        raise SpecError(f"malformed TOML: {error.msg}", path=path, line=error.lineno) from None
    except RecursionError as error:
        raise SpecError(f"malformed TOML: {error}", path=path) from None
    # Lines are looked up by the names that build.toml has for these tables.
    known = text.replace("[tool.kernelpress]", "[general]")
    tool, project = document.get("tool", {}), document.get("project", {})
    table = tool.get("kernelpress", {}) if isinstance(tool, dict) else {}
    for name, value in (("tool", tool), ("tool.kernelpress", table), ("project", project)):
        if not isinstance(value, dict):
            raise SpecError(f"`{name}` must be a table; write it as [{name}]", path=path)
    return path, known, table, project


def _license(project: dict[str, Any], source_dir: Path) -> str:
    """What the project around a package says: its pyproject.toml, or the metadata it was installed with."""
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
