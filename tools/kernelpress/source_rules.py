"""Rules on the sources, before anything is built or run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path

from kernelpress.errors import KernelpressError, SpecError
from kernelpress.files import SourceFile
from kernelpress.findings import Finding
from kernelpress.imports import Import, imported_modules
from kernelpress.layout import Layout
from kernelpress.newer_syntax import newer_syntax
from kernelpress.rewrite import examine
from kernelpress.source import Source, read_source
from kernelpress.spec import Spec

OLDEST_PYTHON = (3, 10)
_ALLOWED = frozenset(("torch", "triton", *sys.stdlib_module_names))
_LIMIT = 1_000_000
_SECRETS = re.compile(
    rb"hf_[A-Za-z0-9]{34}|\bkp_[0-9a-f]{40}\b|gh[pousr]_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9]{32,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_HOMES = re.compile(rb"""["'](?:/home/|/Users/|/root/|[A-Z]:\\+Users\\+)[^"'\n]*""")


def check_sources(spec: Spec) -> list[Finding]:
    """Examine the sources of a kernel by every rule that needs nothing else.

    Returns:
        What was found, by file and line.
    """
    try:
        source = read_source(spec)
    except KernelpressError as error:
        return [as_finding(error)]
    rewritten = examine(source.files, source.layout, source.package_dir)
    found = [
        *rewritten.findings,
        *_undeclared(rewritten.outside, spec),
        *_newer_syntax(source.files),
        *_circles(source.files, source.layout),
        *_contents(source),
    ]
    return sorted(found, key=lambda each: (str(each.path), each.line or 0, each.code))


def as_finding(error: KernelpressError) -> Finding:
    """A refusal as a finding, for those who want one list of everything."""
    code = "KP001" if isinstance(error, SpecError) else "KP002"
    return Finding(code, "error", error.path or Path(), error.line, error.message, "correct it")


def optional_packages(outside: Iterable[tuple[Path, Import]], spec: Spec) -> tuple[str, ...]:
    """Packages that the kernel uses where they are, and does without where they are not."""
    allowed = _declared(spec)
    return tuple(
        sorted(
            {
                top
                for _, each in outside
                if each.when in ("call", "guarded") and (top := each.module.partition(".")[0]) not in allowed
            }
        )
    )


def _declared(spec: Spec) -> frozenset[str]:
    listed = json.loads((files("kernels") / "python_depends.json").read_text("utf-8"))
    known = dict(listed["general"])
    for backend in listed["backends"].values():
        known |= backend
    named = {*spec.python_depends, *(name for backend in spec.backends for name in backend.python_depends)}
    modules = {
        package["import"]
        for name in named
        for package in known.get(name, {}).get("python", ())
        if "import" in package
    }
    return _ALLOWED | modules


def _undeclared(outside: Iterable[tuple[Path, Import]], spec: Spec) -> Iterator[Finding]:
    allowed = _declared(spec)
    for path, each in outside:
        top = each.module.partition(".")[0]
        if each.when == "load" and top not in allowed:
            yield Finding(
                "KP303", "error", path, each.line, f"{top} is imported with the module, and not declared",
                "import it inside the function that needs it, or name it in `python-depends`",
            )  # fmt: skip


def _newer_syntax(sources: Iterable[SourceFile]) -> Iterator[Finding]:
    version = ".".join(map(str, OLDEST_PYTHON))
    for file, line, message in newer_syntax(sources, OLDEST_PYTHON):
        yield Finding("KP301", "error", _at(file), line, message, f"write it as Python {version} reads it")


def _circles(sources: Iterable[SourceFile], layout: Layout) -> Iterator[Finding]:
    """Modules that import each other while they are loaded."""
    by_module = {layout.module_at(file.path): file for file in sources if file.path.endswith(".py")}
    graph: dict[str, dict[str, None]] = {}
    for module, file in by_module.items():
        targets: dict[str, None] = {}
        for source, names, when in imported_modules(file, module):
            if when not in ("load", "guarded"):
                continue
            below = [f"{source}.{name}" for name in names if f"{source}.{name}" in by_module]
            # A package asked for its own modules need not be done with loading.
            targets |= dict.fromkeys(below or [source] if source in by_module or below else [])
        targets.pop(module, None)
        graph[module] = targets
    for circle in _components(graph):
        first = min(circle)
        packages = all(by_module[each].path.endswith("__init__.py") for each in circle)
        if len(circle) > 1 and not packages:
            route = " -> ".join((*circle, circle[0]))
            yield Finding(
                "KP307", "warning", _at(by_module[first]), None, f"modules import each other in a circle: {route}",
                "move what they share into a module of its own, or import inside a function",
            )  # fmt: skip


def _components(graph: dict[str, dict[str, None]]) -> list[list[str]]:
    """Groups of modules each of which reaches every other; by Tarjan's algorithm, without recursion."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []
    for start in graph:
        work = [(start, iter(graph[start]))] if start not in order else []
        if work:
            order[start] = low[start] = len(order)
            stack.append(start)
        while work:
            node, rest = work[-1]
            for target in rest:
                if target not in graph:
                    continue
                if target not in order:
                    order[target] = low[target] = len(order)
                    stack.append(target)
                    work.append((target, iter(graph[target])))
                    break
                if target in stack:
                    low[node] = min(low[node], order[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    index = stack.index(node)
                    found.append(stack[index:])
                    del stack[index:]
    return found


def _contents(source: Source) -> Iterator[Finding]:
    lower: dict[str, str] = {}
    for file in source.files:
        path = _at(file)
        for pattern, code, what, fix in (
            (_SECRETS, "KP104", "what looks like a secret", "take it out, and revoke it"),
            (_HOMES, "KP105", "a path of one machine", "make it relative, or let the caller give it"),
        ):
            for match in pattern.finditer(file.data):
                line = file.data.count(b"\n", 0, match.start()) + 1
                yield Finding(code, "error" if code == "KP104" else "warning", path, line, what, fix)
        if len(file.data) > _LIMIT:
            yield Finding(
                "KP106", "error", path, None, f"{len(file.data):,} bytes, over the limit of {_LIMIT:,}",
                "leave it out",
            )  # fmt: skip
        elif b"\0" in file.data:
            yield Finding("KP106", "error", path, None, "a binary file", "leave it out")
        other = lower.setdefault(file.path.lower(), file.path)
        if other != file.path:
            yield Finding(
                "KP107",
                "error",
                path,
                None,
                f"this name and {other} differ in case alone",
                "rename one of them",
            )


def _at(file: SourceFile) -> Path:
    return file.origin or Path(file.path)
