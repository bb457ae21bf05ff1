"""Fifth step: whether a build holds what the Kernel Hub and its loader demand.

A rule is a function that looks at one variant and yields what it finds; ``@rule`` gives it its code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata  # type: ignore[import-untyped]

from kernelpress.conventions import METADATA, VARIANT_PREFIX
from kernelpress.errors import CheckError
from kernelpress.findings import Finding, Severity
from kernelpress.probe import Probed, probe


@dataclass(frozen=True)
class Subject:
    """A variant under examination. ``metadata`` is ``None`` where ``unreadable`` says why."""

    directory: Path
    metadata: Metadata | None
    probed: Probed | None
    unreadable: str = ""

    def find(self, message: str, fix: str, path: str = "", severity: Severity = "error") -> Finding:
        """A finding about a file of the variant; the rule's code is filled in by the rule."""
        return Finding("", severity, self.directory / path, None, message, fix)


Examine = Callable[[Subject], Iterator[Finding]]
EXAMINED: dict[str, Examine] = {}
_REBUILD = "run `kernelpress build` again"


def rule(code: str) -> Callable[[Examine], Examine]:
    """Enter a function as what examines a variant by a rule."""

    def enter(examine: Examine) -> Examine:
        EXAMINED[code] = examine
        return examine

    return enter


def check(build_dir: Path) -> list[Finding]:
    """Examine every variant of a build by every rule.

    Each variant is also loaded by the ``kernels`` loader in a process of its own, offline and with nothing
    of the project on its path.

    Args:
        build_dir: The directory that holds the variants.

    Returns:
        What was found, in order of variants and rules; a build without errors can be published.

    Raises:
        CheckError: There is no build here.
    """
    directories = (
        sorted(path for path in build_dir.iterdir() if path.name.startswith(VARIANT_PREFIX) and path.is_dir())
        if build_dir.is_dir()
        else []
    )
    if not directories:
        raise CheckError("there is no build here; run `kernelpress build` first", path=build_dir)
    subjects = _subjects(directories)
    return [
        replace(found, code=code)
        for subject in subjects
        for code, examine in EXAMINED.items()
        for found in examine(subject)
    ]


def _subjects(directories: list[Path]) -> list[Subject]:
    read: dict[Path, Metadata] = {}
    unreadable: dict[Path, str] = {}
    for directory in directories:
        try:
            read[directory] = Metadata.read_from_file(directory / METADATA)
        except (OSError, ValueError) as error:
            unreadable[directory] = str(error)
    probed = dict(zip(read, probe(list(read)) if read else (), strict=True))
    return [Subject(each, read.get(each), probed.get(each), unreadable.get(each, "")) for each in directories]


@rule("KP101")
def metadata_parses(subject: Subject) -> Iterator[Finding]:
    if subject.metadata is None:
        yield subject.find(f"the loader cannot read the metadata: {subject.unreadable}", _REBUILD, METADATA)
    elif subject.metadata.version is None:
        yield subject.find("the metadata has no version", _REBUILD, METADATA)


@rule("KP102")
def digest_verifies(subject: Subject) -> Iterator[Finding]:
    if subject.metadata is None:
        return
    if subject.metadata.digest is None:
        yield subject.find("the metadata has no digest", _REBUILD, METADATA)
        return
    try:
        subject.metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, subject.directory))
    except DigestValidationError as error:
        for violation in error.violations:
            yield subject.find(str(violation), _REBUILD)


@rule("KP103")
def nothing_foreign(subject: Subject) -> Iterator[Finding]:
    for path in sorted(subject.directory.rglob("*")):
        name = path.relative_to(subject.directory).as_posix()
        if path.is_symlink():
            yield subject.find("a symbolic link, which the Hub does not keep", _REBUILD, name)
        elif path.name == "__pycache__" or path.suffix in (".pyc", ".pyo"):
            yield subject.find("bytecode, which must not ship", _REBUILD, name)
        elif path.name.startswith("."):
            yield subject.find("a hidden file, which must not ship", _REBUILD, name)


@rule("KP201")
def loads(subject: Subject) -> Iterator[Finding]:
    if subject.probed is None or subject.probed.error is None:
        return
    if subject.probed.unmet:
        yield subject.find(
            f"not tried, because this machine lacks {', '.join(subject.probed.unmet)}",
            "check the build where that is installed",
            severity="warning",
        )
        return
    file, line = subject.probed.file or str(subject.directory), subject.probed.line
    yield Finding(
        "",
        "error",
        Path(file),
        line,
        f"the loader fails: {subject.probed.error}",
        "mend the sources and build again",
    )


@rule("KP202")
def public_names(subject: Subject) -> Iterator[Finding]:
    if subject.probed is None or subject.probed.error is not None:
        return
    path, line = _init_and_all(subject.directory)
    if subject.probed.malformed is not None:
        found = subject.find(
            f"__all__ is {subject.probed.malformed}", "make it a list of the public names, as strings", path
        )
        yield replace(found, line=line)
    elif subject.probed.public is None:
        yield subject.find(
            "the package has no __all__", "list the public names in __all__ of its __init__.py", path
        )
    for name in subject.probed.absent:
        found = subject.find(
            f"__all__ names {name!r}, which the package does not have",
            "define it or take it from __all__",
            path,
        )
        yield replace(found, line=line)


def _init_and_all(variant: Path) -> tuple[str, int | None]:
    """The package's own module within a variant, flat or nested, and the first line where it binds ``__all__``."""
    init = min(variant.rglob("__init__.py"), key=lambda path: (len(path.parts), path), default=None)
    if init is None:
        return "", None
    bound = re.search(rb"^__all__\b", init.read_bytes(), re.MULTILINE)
    line = None if bound is None else init.read_bytes().count(b"\n", 0, bound.start()) + 1
    return init.relative_to(variant).as_posix(), line


@rule("KP203")
def own_namespace(subject: Subject) -> Iterator[Finding]:
    if subject.probed is None:
        return
    for op in subject.probed.foreign_ops:
        yield subject.find(
            f"loading registers operator {op!r}, outside the namespace {subject.probed.namespace!r}",
            "register it through torch.library with its name written out, so that the build can rename it",
        )


@rule("KP204")
def loads_without_triton(subject: Subject) -> Iterator[Finding]:
    if subject.probed is not None and subject.probed.without_triton is not None:
        yield subject.find(
            f"does not load where Triton is not installed: {subject.probed.without_triton}",
            "import Triton where its kernels are first called",
            severity="warning",
        )


@rule("KP205")
def changes_nothing(subject: Subject) -> Iterator[Finding]:
    for effect in subject.probed.effects if subject.probed is not None else ():
        yield subject.find(f"importing it {effect}", "move that into a function that the caller calls")


@rule("KP206")
def loads_beside_another(subject: Subject) -> Iterator[Finding]:
    if subject.probed is not None and subject.probed.twin_error is not None:
        yield subject.find(
            f"beside another build of it in one process: {subject.probed.twin_error}",
            "keep all state within the package",
        )


@rule("KP207")
def traceable(subject: Subject) -> Iterator[Finding]:
    if subject.probed is None:
        return
    for op in subject.probed.untraceable:
        yield subject.find(
            f"operator {op.partition('::')[2]!r} cannot be traced with fake tensors",
            "register an implementation by torch.library.register_fake",
            severity="warning",
        )
    for each in subject.probed.calls:
        name = f"operator {each.op!r}"
        if each.fake == "failed":
            yield Finding(
                "", "warning", Path(each.file or subject.directory), each.line,
                f"{name} cannot be traced with fake tensors: {each.fake_why}",
                "mend its implementation by torch.library.register_fake",
            )  # fmt: skip
        elif each.fake == "not run":
            yield subject.find(
                f"the fake implementation of {name} was not run: no made-up arguments fitted ({each.fake_why})",
                "call it in a test, with torch.library.opcheck",
                severity="note",
            )
        elif each.real == "not run":
            yield subject.find(
                f"{name} was run on fake tensors alone: no made-up arguments fitted it ({each.real_why})",
                "call it in a test, with torch.library.opcheck",
                severity="note",
            )
        elif each.differs:
            yield subject.find(
                f"the fake implementation of {name} promised otherwise than it gave: {each.differs}",
                "if such arguments make sense, mend it",
                severity="note",
            )


@rule("KP208")
def documented(subject: Subject) -> Iterator[Finding]:
    for name, file, line in subject.probed.undocumented if subject.probed is not None else ():
        yield Finding(
            "", "warning", Path(file or subject.directory), line, f"{name} is public and has no docstring", "write one"
        )  # fmt: skip
