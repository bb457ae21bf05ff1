"""Rewrites sources so that the op namespace is left open, and each variant can have its own.

Every edit replaces a name or an import where the syntax tree says it stands, and nothing else. What has nothing
to edit therefore stays byte for byte the same, and no line moves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kernelpress.findings.model import Finding, FindingsError
from kernelpress.rewrite.analyze import Analysis, analyze
from kernelpress.rewrite.references import Definition, own_namespaces
from kernelpress.source.module_map import ModuleMap, module_file
from kernelpress.syntax.imports import Import
from kernelpress.syntax.source_file import SourceFile, garbage_collection_paused
from kernelpress.syntax.text import Edit


@dataclass(frozen=True)
class RewrittenFile:
    """A file cut at every place where the op namespace goes.

    ``chunks`` are the pieces in between: a file without operators is a single one.
    """

    path: str
    chunks: tuple[bytes, ...]

    def render(self, namespace: str) -> bytes:
        """The file with ``namespace`` in every place that is left open."""
        return namespace.encode("ascii").join(self.chunks)


@dataclass(frozen=True)
class Rewritten:
    """All files of the package.

    ``namespaces`` are those under which it registers operators in place, ``findings`` what stands in the way
    of a build, and ``outside`` the imports of other packages with the files that hold them.
    """

    files: tuple[RewrittenFile, ...]
    namespaces: tuple[str, ...]
    findings: tuple[Finding, ...] = ()
    outside: tuple[tuple[Path, Import], ...] = ()

    def raise_errors(self, findings: Sequence[Finding] = ()) -> None:
        """Raise what forbids a build.

        Args:
            findings: All findings in the sources, for the error to hold; by default those of the rewriting.

        Raises:
            FindingsError: There are findings that are errors.
        """
        errors = [finding for finding in self.findings if finding.severity == "error"]
        if errors:
            raise FindingsError(errors, findings or self.findings)


@garbage_collection_paused()
def rewrite(files: Sequence[SourceFile], package: str | ModuleMap, package_dir: Path) -> Rewritten:
    """Leave the op namespace open and make imports of the package by its own name relative.

    What stands in the way is among the findings: a namespace that is only known when the code runs, two operators of
    one name that would come to stand in the same namespace, an import of a module that does not ship.

    Args:
        files: The package's files.
        package: The name under which the package imports itself in place, or a map that also tells of other modules
            that ship.
        package_dir: The package's directory, for messages.
    """
    module_map = ModuleMap(package) if isinstance(package, str) else package
    analyses = analyze(files, module_map)
    own = own_namespaces(ref for analysis in analyses for ref in analysis.references)
    paths = {file.path: file.origin or package_dir / file.path for file in files}
    findings: list[Finding] = []
    for analysis in analyses:
        path = paths[analysis.file.path]
        findings += sorted(_findings(analysis, path, own), key=lambda finding: finding.line or 0)
    findings += _name_conflicts(analyses, paths, own)
    _list_missing_files(findings, analyses, package_dir.absolute().parents[module_map.package.count(".")])
    return Rewritten(
        files=tuple(RewrittenFile(analysis.file.path, _chunks(analysis, own)) for analysis in analyses),
        namespaces=tuple(sorted(own)),
        findings=tuple(findings),
        outside=tuple(
            (paths[analysis.file.path], imported)
            for analysis in analyses
            for imported in analysis.imports.outside
        ),
    )


def _list_missing_files(findings: list[Finding], analyses: Sequence[Analysis], root: Path) -> None:
    """Let the last finding about a module that does not ship end with the files of all of them.

    Args:
        findings: The findings, one of which is replaced.
        analyses: The package's files.
        root: The directory that the first part of the package's name stands in.
    """
    modules = {
        imported.module
        for analysis in analyses
        for imported in analysis.imports.missing
        if imported.when in ("load", "call") and not imported.module.startswith(".")
    }
    # A name that an import takes may be a module's or one in it.
    paths = {
        module_file(root, name) or module_file(root, name.rpartition(".")[0] or name) for name in modules
    }
    files = sorted(
        path.relative_to(root).as_posix()
        for path in paths
        # Of `from package import module` the module alone has to be listed.
        if path is not None and not (path.name == "__init__.py" and _holds_another(path.parent, paths))
    )
    last = max((n for n, finding in enumerate(findings) if finding.code == "KP302"), default=None)
    if last is not None and files:
        fix = f"{findings[last].fix}; all of them: include = {json.dumps(files)}"
        findings[last] = replace(findings[last], fix=fix)


def _holds_another(folder: Path, paths: Iterable[Path | None]) -> bool:
    return any(path is not None and folder in path.parents and path.name != "__init__.py" for path in paths)


def _chunks(analysis: Analysis, own: set[str]) -> tuple[bytes, ...]:
    """A file's content with its edits made, cut where the op namespace goes."""
    conflicts = _conflicting_edits(analysis, own)
    namespaces = {
        Edit(ref.start, ref.end, None)
        for ref in analysis.references
        if ref.namespace in own and ref.start not in conflicts
    }
    data = analysis.file.data
    chunks, piece, position = [], b"", 0
    for edit in sorted([*namespaces, *analysis.imports.edits], key=lambda edit: edit.start):
        piece += data[position : edit.start]
        if edit.text is None:
            chunks.append(piece)
            piece = b""
        else:
            piece += edit.text
        position = edit.end
    return (*chunks, piece + data[position:])


def _conflicting_edits(analysis: Analysis, own: set[str]) -> list[int]:
    """Offsets of namespaces in what is replaced as the name of a module."""
    return sorted(
        {
            ref.start
            for ref in analysis.references
            if ref.namespace in own
            and any(edit.start <= ref.start < edit.end for edit in analysis.imports.edits)
        }
    )


def _findings(analysis: Analysis, path: Path, own: set[str]) -> Iterator[Finding]:
    for problem in analysis.problems:
        yield Finding("KP304", problem.severity, path, problem.line, problem.message, problem.fix)
    for start in _conflicting_edits(analysis, own):
        yield Finding(
            "KP304", "error", path, analysis.file.text.line_of(start),
            "this is a namespace of operators here and the name of a module there, and the build has two names for "
            "them",
            "write out either where it is used",
        )  # fmt: skip
    if own:
        for line in analysis.leaked_ops:
            yield Finding(
                "KP304", "error", path, line, "torch.ops is passed on, which hides the namespace that is used",
                'write `torch.ops.<namespace>` or `getattr(torch.ops, "<namespace>")` here',
            )  # fmt: skip
    for imported in analysis.imports.missing:
        if imported.when in ("load", "call"):
            yield Finding(
                "KP302", "error", path, imported.line,
                f"{imported.module} belongs to the project around the package and does not ship",
                "list its file in `include`, or do without it",
            )  # fmt: skip
    for line in analysis.imports.unknown:
        yield Finding(
            "KP305", "error", path, line, "a module of the project is named in a way that cannot be followed",
            'import it by a statement, or by importlib.import_module("its.name") alone',
        )  # fmt: skip
    for line in analysis.module_names:
        yield Finding(
            "KP305", "warning", path, line,
            "a module of the project is named in text, which stays as it is; in the build the module has another name",
            "start the name with {__name__}, or give the module itself",
        )  # fmt: skip
    for line in analysis.imports.unread:
        yield Finding(
            "KP305", "warning", path, line, "a module is imported by a name that is only known when the code runs",
            "if it is one of the project's, start the name with {__name__}",
        )  # fmt: skip


def _name_conflicts(
    analyses: Sequence[Analysis], paths: Mapping[str, Path], own: set[str]
) -> Iterator[Finding]:
    """Operators of one name in namespaces that become one."""
    first: dict[str, str] = {}
    only = ""
    for analysis in analyses:
        path, text = paths[analysis.file.path], analysis.file.text
        created = [ref for ref in analysis.references if ref.creates and ref.namespace in own]
        defined = [Definition(text.line_of(ref.start), ref.namespace, ref.op) for ref in created if ref.op]
        defined += analysis.definitions
        for definition in sorted(defined, key=lambda definition: definition.line):
            line, namespace, op = definition.line, definition.namespace, definition.op
            if namespace is None or op is None:
                if len(own) > 1 and (namespace is None or namespace in own):
                    yield _unknown_operator(path, line, "name" if namespace else "namespace", own)
            elif namespace in own and first.setdefault(op, namespace) != namespace:
                yield Finding(
                    "KP306", "error", path, line,
                    f"operator {op!r} is defined in {first[op]!r} and in {namespace!r}, which become one namespace in "
                    "the build",
                    "rename one of them",
                )  # fmt: skip
        for ref in created:
            if ref.unnamed and len(own) > 1:
                yield _unknown_operator(path, text.line_of(ref.start), "name", own)
            only = only or (ref.namespace if ref.exclusive else "")
            if ref.exclusive and ref.namespace != only:
                yield Finding(
                    "KP306", "error", path, text.line_of(ref.start),
                    f"a Library of kind DEF opens {only!r} and another one {ref.namespace!r}, which become one "
                    "namespace in the build, where PyTorch allows a single one of that kind",
                    'make this one a "FRAGMENT"',
                )  # fmt: skip


def _unknown_operator(path: Path, line: int, unknown: str, own: set[str]) -> Finding:
    return Finding(
        "KP306", "error", path, line,
        f"the {unknown} of this operator is only known when the code runs, and the namespaces "
        f"{', '.join(map(repr, sorted(own)))} become one in the build",
        "write the name out, or create all operators in one namespace"
        if unknown == "name"
        else "call it on a variable that is assigned a torch.library.Library once, or create all operators in one "
        "namespace",
    )  # fmt: skip
