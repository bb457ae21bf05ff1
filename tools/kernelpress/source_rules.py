"""Rules on the sources: a linter that reads no file, and runs none."""

from __future__ import annotations

import ast
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from kernelpress.files import SourceFile
from kernelpress.findings import Finding, Severity
from kernelpress.imports import Import, imported_modules
from kernelpress.layout import Layout
from kernelpress.newer_syntax import newer_syntax
from kernelpress.rewrite import Rewritten
from kernelpress.source import Source
from kernelpress.spec_model import Spec
from kernelpress.spec_reader import python_dependencies
from kernelpress.text import parse, statements

OLDEST_PYTHON = (3, 10)
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
    """Examine the sources of a kernel by every rule that needs nothing else.

    Args:
        source: The sources as they were read.
        rewritten: The same as they ship; its own findings are not repeated.
        spec: The kernel.
    """
    return [
        *_undeclared(rewritten.outside, spec),
        *_old_syntax(source.files),
        *_circles(source.files, source.layout),
        *_contents(source, spec.root / "CARD.md"),
    ]


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
    listed = python_dependencies()
    packages = dict(listed["general"])
    for backend in listed["backends"].values():
        packages |= backend
    declared = {*spec.python_depends, *(name for backend in spec.backends for name in backend.python_depends)}
    modules = {
        package["import"]
        for name in declared
        for package in packages.get(name, {}).get("python", ())
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


def _old_syntax(sources: Iterable[SourceFile]) -> Iterator[Finding]:
    version = ".".join(map(str, OLDEST_PYTHON))
    for file in sources:
        if not file.path.endswith(".py"):
            continue
        places: Iterable[tuple[int | None, str]]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.data, feature_version=OLDEST_PYTHON)
            places = newer_syntax(file.data, tree)
        except SyntaxError as error:
            places = [(_newer(file) or error.lineno, error.msg)]
        for line, syntax in dict.fromkeys(places):
            yield Finding(
                "KP301", "error", _at(file), line, f"no syntax of Python {version}: {syntax}",
                f"write it as Python {version} reads it",
            )  # fmt: skip


def _newer(file: SourceFile) -> int | None:
    """The line where newer syntax begins; Python's own parser names the one where a block of it ends."""
    newer = ("TryStar", "TypeAlias")
    lines = [node.lineno for node in statements(parse(file.data)) if type(node).__name__ in newer]
    return min(lines, default=None)


def _circles(sources: Iterable[SourceFile], layout: Layout) -> Iterator[Finding]:
    """Modules that import each other while they are loaded."""
    by_module = {layout.module_at(file.path): file for file in sources if file.path.endswith(".py")}
    graph: dict[str, dict[str, None]] = {}
    for module, file in by_module.items():
        targets: dict[str, None] = {}
        for source, names, when in imported_modules(parse(file.data), file.path, module):
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


def _contents(source: Source, card: Path) -> Iterator[Finding]:
    for file in source.files:
        yield from _private(_at(file), file.data)
        if len(file.data) > _LIMIT:
            yield Finding(
                "KP106", "error", _at(file), None, f"{len(file.data):,} bytes, over the limit of {_LIMIT:,}",
                "leave it out",
            )  # fmt: skip
        elif b"\0" in file.data:
            yield Finding("KP106", "error", _at(file), None, "a binary file", "leave it out")
    # The card goes to the Hub with the sources.
    yield from _private(card, (source.card or "").encode())
    lower: dict[str, str] = {}
    for file in source.files:
        other = lower.setdefault(file.path.lower(), file.path)
        if other != file.path:
            yield Finding(
                "KP107", "error", _at(file), None, f"this name and {other} differ in case alone",
                "rename one of them",
            )  # fmt: skip


def _private(path: Path, data: bytes) -> Iterator[Finding]:
    """Text that nobody should publish."""
    for pattern, code, severity, message, fix in _PRIVATE:
        for match in pattern.finditer(data):
            line = data.count(b"\n", 0, match.start()) + 1
            yield Finding(code, severity, path, line, message, fix)


def _at(file: SourceFile) -> Path:
    return file.origin or Path(file.path)
