"""Rules on the sources of a kernel: a linter that takes them as they were read and rewritten."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kernelpress.findings.model import Finding, Severity
from kernelpress.lint.import_cycles import import_cycles
from kernelpress.rewrite.rewrite import Rewritten
from kernelpress.source.file import newer_syntax_finding
from kernelpress.source.read import Source
from kernelpress.spec.model import Spec
from kernelpress.spec.validate import python_dependencies
from kernelpress.syntax.execution import When
from kernelpress.syntax.imports import Import, imported_modules
from kernelpress.syntax.python_version import newer_syntax
from kernelpress.syntax.source_file import SourceFile

_ALLOWED = frozenset(("torch", "triton", *sys.stdlib_module_names))
_LIMIT = 1_000_000
_SECRETS = re.compile(
    rb"hf_[A-Za-z0-9]{34}|\bkp_[0-9a-f]{40}\b|gh[pousr]_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9]{32,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_HOMES = re.compile(rb"""["'](?:/home/|/Users/|/root/|[A-Z]:\\+Users\\+)[^"'\n]*""")
_PRIVATE: tuple[tuple[re.Pattern[bytes], str, Severity, str, str], ...] = (
    (_SECRETS, "KP104", "error", "what looks like a secret", "take it out, and revoke it"),
    (_HOMES, "KP105", "warning", "a path of one machine", "make it relative, or let the caller give it"),
)


def lint(source: Source, rewritten: Rewritten, spec: Spec) -> list[Finding]:
    """Check the sources of a kernel by every rule that needs no build.

    Args:
        source: The sources as they were read.
        rewritten: The same as they ship; its own findings are not repeated.
        spec: The kernel.
    """
    return [
        *_undeclared(source, rewritten.outside, spec),
        *_newer_syntax(source.files),
        *_import_cycles(source),
        *_contents(source, spec.root / "CARD.md"),
        *_described(spec),
    ]


def optional_packages(outside: Iterable[tuple[Path, Import]], spec: Spec) -> tuple[str, ...]:
    """Packages that the kernel uses where they are, and does without where they are not."""
    allowed = _declared(spec)
    return tuple(
        sorted(
            {
                top
                for _, imported in outside
                if imported.when in ("call", "guarded")
                and (top := imported.module.partition(".")[0]) not in allowed
            }
        )
    )


def _declared(spec: Spec) -> frozenset[str]:
    """Modules that a kernel may import when it is loaded."""
    packages = _listed_packages()
    declared = {*spec.python_depends, *(name for backend in spec.backends for name in backend.python_depends)}
    modules = {module for name in declared for module in _modules(packages.get(name, {}))}
    return _ALLOWED | modules


def _listed_packages() -> dict[str, Any]:
    """The packages that upstream allows a kernel to depend on, by name."""
    listed = python_dependencies()
    packages = dict(listed["general"])
    for backend in listed["backends"].values():
        packages |= backend
    return packages


def _modules(package: Mapping[str, Any]) -> list[str]:
    return [entry["import"] for entry in package.get("python", ()) if "import" in entry]


def _undeclared(source: Source, outside: Iterable[tuple[Path, Import]], spec: Spec) -> Iterator[Finding]:
    allowed = _declared(spec)
    undeclared = [
        (path, imported.line, top)
        for path, imported in outside
        if imported.when == "load" and (top := imported.module.partition(".")[0]) not in allowed
    ]
    optional = _optional_modules(source) if undeclared else frozenset()
    declarable = {module for package in _listed_packages().values() for module in _modules(package)}
    for path, line, top in undeclared:
        if path not in optional:
            declare = ", or name its package in `python-depends`" * (top in declarable)
            yield Finding(
                "KP303", "error", path, line, f"{top} is imported with the module, and not declared",
                f"import it inside the function that needs it, or catch the ImportError{declare}",
            )  # fmt: skip


def _optional_modules(source: Source) -> frozenset[Path]:
    """Files of modules that others import only under a condition, or where a failure is caught."""
    modules = _modules_of(source)
    times: dict[str, set[When]] = {}
    for name, file in modules.items():
        for imported, names, when in imported_modules(file, name):
            for target in {imported, *(f"{imported}.{taken}" for taken in names)}:
                # A module's packages are loaded with it.
                for package in accumulate(target.split("."), "{}.{}".format):
                    times.setdefault(package, set()).add(when)
    return frozenset(
        _at(file) for name, file in modules.items() if times.get(name, set()) - {"typing"} == {"guarded"}
    )


def _newer_syntax(files: Iterable[SourceFile]) -> Iterator[Finding]:
    for file, line, message in newer_syntax(files):
        yield newer_syntax_finding(file, line, message)


def _modules_of(source: Source) -> dict[str, SourceFile]:
    return {
        source.module_map.module_at(file.path): file for file in source.files if file.path.endswith(".py")
    }


def _import_cycles(source: Source) -> Iterator[Finding]:
    modules = _modules_of(source)
    for cycle in import_cycles(modules):
        if all(modules[module].path.endswith("__init__.py") for module in cycle):
            continue
        route = " -> ".join((*cycle, cycle[0]))
        yield Finding(
            "KP307", "warning", _at(modules[min(cycle)]), None, f"modules import each other in a circle: {route}",
            "move what they share into a module of its own, or import inside a function",
        )  # fmt: skip


def _contents(source: Source, card: Path) -> Iterator[Finding]:
    lowercase: dict[str, str] = {}
    for file in source.files:
        yield from _private(_at(file), file.data)
        if len(file.data) > _LIMIT:
            yield Finding(
                "KP106", "error", _at(file), None, f"{len(file.data):,} bytes, over the limit of {_LIMIT:,}",
                "leave it out",
            )  # fmt: skip
        elif b"\0" in file.data:
            yield Finding("KP106", "error", _at(file), None, "a binary file", "leave it out")
        other = lowercase.setdefault(file.path.lower(), file.path)
        if other != file.path:
            yield Finding(
                "KP107", "error", _at(file), None, f"this name and {other} differ in case alone",
                "rename one of them",
            )  # fmt: skip
    # The card goes to the Hub with the sources.
    yield from _private(card, (source.card or "").encode())


def _described(spec: Spec) -> Iterator[Finding]:
    """Secrets in the addresses that the description names, which are part of every variant's metadata."""
    path = spec.root / ("build.toml" if spec.source_dir is None else "pyproject.toml")
    for address in (spec.upstream, spec.source):
        if address is None:
            continue
        if urlsplit(address).password is not None:
            message, fix = "an address with a password in it", "take the password out, and change it"
            yield Finding("KP104", "error", path, None, message, fix)
        else:
            yield from (replace(finding, line=None) for finding in _private(path, address.encode()))


def _private(path: Path, data: bytes) -> Iterator[Finding]:
    """Text that nobody should publish."""
    for pattern, code, severity, message, fix in _PRIVATE:
        for match in pattern.finditer(data):
            line = data.count(b"\n", 0, match.start()) + 1
            yield Finding(code, severity, path, line, message, fix)


def _at(file: SourceFile) -> Path:
    return file.origin or Path(file.path)
