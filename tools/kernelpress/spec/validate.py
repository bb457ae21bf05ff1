"""Validates a description of a kernel, and names the line of whatever is wrong with it."""

from __future__ import annotations

import json
import keyword
import re
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from kernelpress.errors import SpecError
from kernelpress.spec.model import BACKENDS, DEFAULT_PYEXT, EDITION, BackendSpec, Spec, is_repo_id

_LOADER_ARGS = {"cuda_capabilities": "cuda", "rocm_archs": "rocm"}
# Key -> what it must be. A table within [general] for a backend holds dependencies of that backend alone.
_GENERAL: dict[str, type] = {
    "name": str,
    "version": int,
    "edition": int,
    "license": str,
    "backends": list,
    "upstream": str,
    "source": str,
    "python-depends": list,
    "kernel-depends": list,
    "hub": dict,
    "cuda": dict,
    "neuron": dict,
    "tpu": dict,
    "xpu": dict,
}
_REQUIRED = ("name", "version", "edition", "license", "backends")
_TYPE_NAMES = {str: "a string", int: "a whole number", list: "a list of strings", dict: "a table"}
_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")


def validate(path: Path, text: str, document: dict[str, Any]) -> Spec:
    """Read a document of build.toml's form, which need not be one.

    Args:
        path: The file to name in messages; its directory becomes the spec's root.
        text: The file's content, to find lines in.
        document: The document.

    Raises:
        SpecError: It asks for something that kernelpress does not accept; with the line where there is one.
    """
    return _Validator(path, text, document).spec()


@cache
def python_dependencies() -> dict[str, Any]:
    """Upstream's list of packages that a kernel may depend on: ``{"general": {...}, "backends": {name: {...}}}``."""
    dependencies: dict[str, Any] = json.loads((files("kernels") / "python_depends.json").read_text("utf-8"))
    return dependencies


def _imported_names() -> set[str]:
    """Top-level modules that a kernel, its tests or the loader import, so that none may be called like them."""
    listed = python_dependencies()
    dependencies = (listed["general"], *listed["backends"].values())
    packages = [package for group in dependencies for item in group.values() for package in item["python"]]
    names = {package["import"] for package in packages if "import" in package}
    return {"torch", "triton", "kernels"} | names | sys.stdlib_module_names


def _line_of(text: str, keys: tuple[str, ...]) -> int | None:
    """The line of a key or table, or of the nearest table around it."""
    table: tuple[str, ...] = ()
    best: tuple[int, int] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]#]+?)\s*\]", line):
            table = _split_key(header[1])
            path = table
        elif entry := re.match(r"""\s*([\w"'.\- ]+?)\s*=""", line):
            path = table + _split_key(entry[1])
        else:
            continue
        depth = len(path) if keys[: len(path)] == path else 0
        if depth and (best is None or depth > best[0]):
            best = (depth, number)
    return best[1] if best else None


def _split_key(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


class _Validator:
    def __init__(self, path: Path, text: str, document: dict[str, Any]) -> None:
        self.path = path
        self.text = text
        self.document = document

    def error(self, message: str, *keys: str) -> SpecError:
        return SpecError(message, path=self.path, line=_line_of(self.text, keys))

    def spec(self) -> Spec:
        self.compiled()
        self.edition()
        self.known(self.document, ("general", "torch-noarch", "kernel"))
        for table in ("general", "torch-noarch"):
            if not isinstance(self.document.get(table), dict):
                raise self.error(f"there is no [{table}] table; add one", table)
        general = self.document["general"]
        self.known(general, tuple(_GENERAL), "general")
        for key in _REQUIRED:
            if key not in general:
                raise self.error(f"[general] has no `{key}`; add it", "general")
        for key, value in general.items():
            self.typed(value, _GENERAL[key], "general", key)
        backends = self.backends(general["backends"])
        archs = self.archs(backends)
        return Spec(
            root=self.path.parent,
            name=self.name(general["name"]),
            version=self.version(general["version"]),
            license=self.license(general["license"]),
            backends=tuple(
                BackendSpec(name, self.backend_depends(general, name), (), archs.get(name))
                for name in backends
            ),
            python_depends=self.depends(general.get("python-depends", []), "", "general", "python-depends"),
            repo_id=self.repo_id(general.get("hub", {})),
            pyext=self.pyext(),
            upstream=general.get("upstream"),
            source=general.get("source"),
        )

    def compiled(self) -> None:
        for table, value in self.document.items():
            # Once, [torch] held what [torch-noarch] holds today.
            sources = isinstance(value, dict) and bool(value.get("src"))
            if (
                table == "tvm-ffi"
                or (table == "kernel" and value != {})
                or (table == "torch" and (sources or self.is_todays()))
            ):
                raise self.error(
                    f"[{table}] describes compiled sources, which need kernel-builder; "
                    "kernelpress builds Python and Triton packages: use [torch-noarch]",
                    table,
                    *(list(value)[:1] if table == "kernel" and isinstance(value, dict) else ()),
                )

    def is_todays(self) -> bool:
        general = self.document.get("general")
        return not isinstance(general, dict) or general.get("edition") == EDITION

    def edition(self) -> None:
        if self.is_todays():
            return
        edition = self.document["general"].get("edition")
        if edition is not None:
            self.typed(edition, int, "general", "edition")
        if edition is not None and edition > EDITION:
            raise self.error(
                f"edition {edition} is newer than kernelpress; update kernelpress", "general", "edition"
            )
        which = "has no `edition`" if edition is None else f"is of edition {edition}"
        raise self.error(
            f"[general] {which}, so this is an older form; `kernelpress migrate` brings it to edition {EDITION}",
            "general",
            "edition",
        )

    def known(self, table: dict[str, Any], keys: tuple[str, ...], *where: str) -> None:
        for key in table:
            if key not in keys:
                table_name = f" in [{'.'.join(where)}]" if where else ""
                raise self.error(f"unknown key `{key}`{table_name}; known are {', '.join(keys)}", *where, key)

    def typed(self, value: Any, kind: type, *keys: str) -> None:
        items: Any = value
        # In Python, though not in TOML, a truth value is a whole number too.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"`{keys[-1]}` must be {_TYPE_NAMES[kind]}, not {value!r}", *keys)
        if kind is list and keys[-1] != "kernel-depends":
            for item in items:
                if not isinstance(item, str):
                    raise self.error(f"`{keys[-1]}` must be a list of strings, but holds {item!r}", *keys)

    def name(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise self.error(
                f"{name!r} is no kernel name: lowercase letters, digits and dashes, a letter first, "
                "no dash at the end, at least two characters (such as 'my-kernel')",
                "general",
                "name",
            )
        module = name.replace("-", "_")
        if keyword.iskeyword(module) or module in _imported_names():
            reason = (
                "is a word of Python's" if keyword.iskeyword(module) else "is a module that kernels import"
            )
            raise self.error(
                f"{name!r} is no kernel name, as {module} {reason}; name it otherwise (such as '{name}-kernel')",
                "general",
                "name",
            )
        return name

    def version(self, version: int) -> int:
        if version < 0:
            raise self.error(f"version {version} is below 0; versions count up from 0", "general", "version")
        return version

    def license(self, text: str) -> str:
        try:
            return canonicalize_license_expression(text)
        except InvalidLicenseExpression:
            raise self.error(
                f"{text!r} is no SPDX licence identifier; write one such as 'Apache-2.0' or 'MIT'",
                "general",
                "license",
            ) from None

    def backends(self, names: list[str]) -> tuple[str, ...]:
        if not names:
            raise self.error("`backends` is empty; name at least one", "general", "backends")
        for name in names:
            if name not in BACKENDS:
                raise self.error(
                    f"unknown backend {name!r}; known are {', '.join(BACKENDS)}", "general", "backends"
                )
            if names.count(name) > 1:
                raise self.error(f"backend {name!r} is listed twice; remove one", "general", "backends")
        return tuple(names)

    def depends(self, names: list[str], backend: str, *keys: str) -> tuple[str, ...]:
        listed = python_dependencies()
        allowed = listed["backends"].get(backend, {}) if backend else listed["general"]
        for name in names:
            if name in allowed:
                continue
            for other, its in listed["backends"].items():
                if name in its:
                    raise self.error(
                        f"{name!r} belongs to the {other} backend; move it to [general.{other}]", *keys
                    )
            raise self.error(
                f"a kernel cannot depend on {name!r}; the Kernel Hub allows here "
                f"{', '.join(sorted(allowed)) or 'nothing'}",
                *keys,
            )
        return tuple(sorted(set(names)))

    def backend_depends(self, general: dict[str, Any], backend: str) -> tuple[str, ...]:
        names = general.get(backend, {}).get("python-depends", [])
        self.typed(names, list, "general", backend, "python-depends")
        return self.depends(names, backend, "general", backend, "python-depends")

    def repo_id(self, hub: dict[str, Any]) -> str | None:
        self.known(hub, ("repo-id", "branch"), "general", "hub")
        if "branch" in hub:
            raise self.error(
                "`branch` is not supported, as each version has a branch of its own; remove the key",
                "general",
                "hub",
                "branch",
            )
        repo_id = hub.get("repo-id")
        if repo_id is not None and not (isinstance(repo_id, str) and is_repo_id(repo_id)):
            raise self.error(
                f"{repo_id!r} is no repository id; write it as 'organization/name'",
                "general",
                "hub",
                "repo-id",
            )
        return repo_id

    def pyext(self) -> tuple[str, ...]:
        suffixes = self.document["torch-noarch"].get("pyext", list(DEFAULT_PYEXT))
        self.typed(suffixes, list, "torch-noarch", "pyext")
        for suffix in suffixes:
            if not re.fullmatch(r"\w+(\.\w+)*", suffix):
                raise self.error(f"{suffix!r} is no suffix; write it without a dot", "torch-noarch", "pyext")
        if "py" not in suffixes:
            raise self.error(
                "`pyext` leaves out 'py', so nothing could be imported; add it", "torch-noarch", "pyext"
            )
        return tuple(suffixes)

    def archs(self, backends: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        table = self.document["torch-noarch"]
        self.known(table, ("pyext", *_LOADER_ARGS), "torch-noarch")
        archs = {}
        for key, backend in _LOADER_ARGS.items():
            if key not in table:
                continue
            self.typed(table[key], list, "torch-noarch", key)
            if not table[key]:
                continue
            if backend not in backends:
                raise self.error(
                    f"`{key}` is given, but {backend} is not among the backends", "torch-noarch", key
                )
            archs[backend] = tuple(table[key])
        return archs
