"""Third step: sources in which the op namespace is left open, so that each variant can have its own.

Every edit replaces a name or an import where the syntax tree says it stands, and nothing else. What has nothing
to edit therefore stays byte for byte the same, and no line moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kernelpress.analysis import Analysis, analyse
from kernelpress.files import SourceFile
from kernelpress.findings import Finding, FindingsError
from kernelpress.follow import follow
from kernelpress.imports import Import
from kernelpress.layout import Layout
from kernelpress.memory import Memory
from kernelpress.shared import shared
from kernelpress.text import Edit, Text

# PyTorch's own: a package may extend them, but they are never its own to rename.
_FOREIGN = frozenset(
    (
        "aten",
        "prim",
        "prims",
        "quantized",
        "c10d",
        "_c10d_functional",
        "inductor",
        "torchvision",
        "torchaudio",
    )
)


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


def rewrite(
    files: Sequence[SourceFile], package: str | Layout, package_dir: Path, memory: Memory | None = None
) -> Rewritten:
    """Leave the op namespace open and make imports of the package by its own name relative.

    Args:
        files: The package's files.
        package: The name under which the package imports itself in place, or what ships beside it as well.
        package_dir: Where the files stand, for messages.
        memory: What is known of sources; without it, each is looked at.

    Raises:
        FindingsError: A namespace that is only known when the code runs, two operators of one name that would
            come to stand in the same namespace, or an import of a module that does not ship; all of them.
    """
    rewritten = examine(files, package, package_dir, memory)
    errors = [each for each in rewritten.findings if each.severity == "error"]
    if errors:
        raise FindingsError(errors, rewritten.findings)
    return rewritten


def examine(
    files: Sequence[SourceFile], package: str | Layout, package_dir: Path, memory: Memory | None = None
) -> Rewritten:
    """The same, with what stands in the way as findings."""
    layout = Layout(package) if isinstance(package, str) else package
    memory = memory or Memory()
    looked = _followed(
        [
            (replace(file, origin=file.origin or package_dir / file.path), each)
            for file, each in zip(files, analyse(files, layout, memory), strict=True)
        ],
        layout,
        memory,
    )
    own = {site.namespace for _, each in looked for site in each.sites if site.creates} - _FOREIGN
    findings = [
        finding
        for file, each in looked
        for finding in sorted(_findings(file, each, own), key=lambda finding: finding.line or 0)
    ]
    findings += _clashes(looked, own)
    return Rewritten(
        files=tuple(RewrittenFile(file.path, _cut(file, each, own)) for file, each in looked),
        namespaces=tuple(sorted(own)),
        findings=tuple(findings),
        outside=tuple((_at(file), found) for file, each in looked for found in each.outside),
    )


def _followed(
    looked: list[tuple[SourceFile, Analysis]], layout: Layout, memory: Memory
) -> list[tuple[SourceFile, Analysis]]:
    """With what files want of one another, which is not known of one alone."""
    if not any(each.wanted for _, each in looked):
        return looked
    found = follow(
        [(file, each.wanted) for file, each in looked],
        layout,
        shared([file for file, _ in looked], layout, memory),
    )
    return [
        (
            file,
            replace(
                each,
                sites=(*each.sites, *found.sites.get(file.path, ())),
                problems=(*each.problems, *found.problems.get(file.path, ())),
            ),
        )
        for file, each in looked
    ]


def _cut(file: SourceFile, found: Analysis, own: set[str]) -> tuple[bytes, ...]:
    taken = _both(found, own)
    edits = {
        Edit(site.start, site.end, None)
        for site in found.sites
        if site.namespace in own and site.start not in taken
    }
    chunks, piece, at = [], b"", 0
    for edit in sorted([*edits, *found.edits], key=lambda edit: edit.start):
        piece += file.data[at : edit.start]
        if edit.text is None:
            chunks.append(piece)
            piece = b""
        else:
            piece += edit.text
        at = edit.end
    return (*chunks, piece + file.data[at:])


def _both(found: Analysis, own: set[str]) -> tuple[int, ...]:
    """Where the name of a namespace stands in what is replaced as the name of a module."""
    return tuple(
        site.start
        for site in found.sites
        if site.namespace in own and any(edit.start <= site.start < edit.end for edit in found.edits)
    )


def _left(file: SourceFile, found: Analysis, own: set[str]) -> list[int]:
    """Lines that name an operator and stay, other than those of a name that another file has asked for."""
    of = Text(file.data).line_of
    known = (
        {of(site.start) for site in found.sites} if any(m.namespace in own for m in found.mentions) else set()
    )
    return sorted({each.line for each in found.mentions if each.namespace in own} - known)


def _findings(file: SourceFile, found: Analysis, own: set[str]) -> Iterator[Finding]:
    path = _at(file)
    for each in found.problems:
        yield Finding("KP304", "error", path, each.line, each.message, each.fix)
    for start in sorted(_both(found, own)):
        yield Finding(
            "KP304", "error", path, Text(file.data).line_of(start),
            "this is a namespace of operators here and the name of a module there, and the build has two names for "
            "them",
            "write out either where it is used",
        )  # fmt: skip
    if own:
        for line in found.escapes:
            yield Finding(
                "KP304", "error", path, line, "torch.ops is passed on, which hides the namespace that is used",
                'write `torch.ops.<namespace>` or `getattr(torch.ops, "<namespace>")` here',
            )  # fmt: skip
    for line in _left(file, found, own):
        yield Finding(
            "KP304", "warning", path, line,
            "this names an operator of the package in a way that is not known, and stays as it is; in the build the "
            "operator has another name",
            "give the operator itself, or name it as a function of torch.library or torch.ops takes it",
        )  # fmt: skip
    for module in found.missing:
        if module.when in ("load", "call"):
            yield Finding(
                "KP302", "error", path, module.line,
                f"{module.module} belongs to the project around the package and does not ship",
                "list its file in `include`, or do without it",
            )  # fmt: skip
    for line in found.unknown:
        yield Finding(
            "KP305", "error", path, line, "a module of the project is named in a way that cannot be followed",
            'import it by a statement, or by importlib.import_module("its.name") alone',
        )  # fmt: skip
    for line in found.unread:
        yield Finding(
            "KP305", "warning", path, line, "a module is imported by a name that is only known when the code runs",
            "if it is one of the project's, start the name with {__name__}",
        )  # fmt: skip


def _clashes(looked: Sequence[tuple[SourceFile, Analysis]], own: set[str]) -> Iterator[Finding]:
    """Several namespaces become one, so their operators must differ in name."""
    first: dict[str, str] = {}
    for file, each in looked:
        for site in each.sites:
            if not (site.creates and site.op and site.namespace in own):
                continue
            if first.setdefault(site.op, site.namespace) != site.namespace:
                yield Finding(
                    "KP306", "error", _at(file), Text(file.data).line_of(site.start),
                    f"operator {site.op!r} is defined in {first[site.op]!r} and in {site.namespace!r}, which "
                    "become one namespace in the build",
                    "rename one of them",
                )  # fmt: skip


def _at(file: SourceFile) -> Path:
    return file.origin or Path(file.path)
