"""Rules on a built variant: what the Kernel Hub and its loader demand.

A rule is a function that looks at one variant and yields what it finds; ``@rule`` gives it its code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata  # type: ignore[import-untyped]

from kernelpress.conventions import METADATA, VARIANT_PREFIX
from kernelpress.errors import CheckError
from kernelpress.findings.model import Finding, Severity
from kernelpress.probe.probe import EnvironmentFault, Probed, probe


@dataclass(frozen=True)
class Subject:
    """A variant under examination. ``metadata`` and ``probed`` are ``None`` where ``unreadable`` says why."""

    directory: Path
    metadata: Metadata | None
    probed: Probed | None
    unreadable: str = ""

    def find(
        self,
        message: str,
        fix: str,
        path: str | Path = "",
        line: int | None = None,
        severity: Severity = "error",
    ) -> Finding:
        """A finding about the variant, or a file of it by its path there or in full; ``check`` fills in the code."""
        return Finding("", severity, self.directory / path, line, message, fix)


RuleCheck = Callable[[Subject], Iterable[Finding]]
RULE_CHECKS: dict[str, RuleCheck] = {}
_REBUILD = "run `kernelpress build` again"


def rule(code: str) -> Callable[[RuleCheck], RuleCheck]:
    """Register the function that examines a variant by a rule."""

    def enter(examine: RuleCheck) -> RuleCheck:
        RULE_CHECKS[code] = examine
        return examine

    return enter


def probe_rule(code: str) -> Callable[[Callable[[Subject, Probed], Iterable[Finding]]], None]:
    """Register the function that examines by a rule what loading a variant showed, where it could be tried."""

    def enter(examine: Callable[[Subject, Probed], Iterable[Finding]]) -> None:
        rule(code)(lambda subject: () if subject.probed is None else examine(subject, subject.probed))

    return enter


def check(build_dir: Path, say: Callable[[str], None] = lambda text: None) -> list[Finding]:
    """Examine every variant of a build by every rule.

    Each variant is also loaded by the ``kernels`` loader in a process of its own, offline and with nothing
    of the project on its path.

    Args:
        build_dir: The directory that holds the variants.
        say: Called with a line before the variants are loaded, which takes a while.

    Returns:
        What was found, in order of variants and rules; a build without errors can be published.

    Raises:
        CheckError: There is no build here.
    """
    directories = sorted(path for path in build_dir.glob(f"{VARIANT_PREFIX}*") if path.is_dir())
    if not directories:
        raise CheckError("there is no build here; run `kernelpress build` first", path=build_dir)
    subjects, findings = _subjects(directories, say)
    return findings + [
        replace(finding, code=code)
        for subject in subjects
        for code, examine in RULE_CHECKS.items()
        for finding in examine(subject)
    ]


def _subjects(directories: list[Path], say: Callable[[str], None]) -> tuple[list[Subject], list[Finding]]:
    """The variants with what loading them showed; where none can be loaded, a finding that says so once."""
    metadata: dict[Path, Metadata] = {}
    unreadable: dict[Path, str] = {}
    for directory in directories:
        try:
            metadata[directory] = Metadata.read_from_file(directory / METADATA)
        except (OSError, ValueError) as error:
            unreadable[directory] = str(error)
    probed: dict[Path, Probed] = {}
    findings = []
    try:
        probed = dict(zip(metadata, probe(list(metadata), say) if metadata else (), strict=True))
    except EnvironmentFault as fault:
        findings = [Finding("KP201", "error", directories[0].parent, None, fault.reason, fault.fix)]
    subjects = [
        Subject(directory, metadata.get(directory), probed.get(directory), unreadable.get(directory, ""))
        for directory in directories
    ]
    return subjects, findings


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
        name = path.relative_to(subject.directory)
        if path.is_symlink():
            yield subject.find("a symbolic link, which the Hub does not keep", _REBUILD, name)
        elif path.name == "__pycache__" or path.suffix in (".pyc", ".pyo"):
            yield subject.find("bytecode, which must not ship", _REBUILD, name)
        elif path.name.startswith("."):
            yield subject.find("a hidden file, which must not ship", _REBUILD, name)


@probe_rule("KP201")
def loads(subject: Subject, probed: Probed) -> Iterator[Finding]:
    if probed.error is not None and probed.unmet:
        yield subject.find(
            f"not tried, because this machine lacks {', '.join(probed.unmet)}",
            "check the build where that is installed",
            severity="warning",
        )
    elif probed.error is not None:
        yield subject.find(
            f"the loader fails: {probed.error}",
            "mend the sources and build again",
            probed.file or "",
            probed.line,
        )


@probe_rule("KP202")
def public_names(subject: Subject, probed: Probed) -> Iterator[Finding]:
    if probed.error is not None:
        return
    path, line = _init_and_all(subject.directory)
    if probed.malformed is not None:
        yield subject.find(
            f"__all__ is {probed.malformed}", "make it a list of the public names, as strings", path, line
        )
    elif probed.public is None:
        yield subject.find(
            "the package has no __all__", "list the public names in __all__ of its __init__.py", path
        )
    for name in probed.absent:
        yield subject.find(
            f"__all__ names {name!r}, which the package does not have",
            "define it or take it from __all__",
            path,
            line,
        )


def _init_and_all(variant: Path) -> tuple[Path | str, int | None]:
    """The package's own module, relative to the variant, and the first line where it binds ``__all__``."""
    init = min(variant.rglob("__init__.py"), key=lambda path: (len(path.parts), path), default=None)
    if init is None:
        return "", None
    data = init.read_bytes()
    bound = re.search(rb"^__all__\b", data, re.MULTILINE)
    line = None if bound is None else data.count(b"\n", 0, bound.start()) + 1
    return init.relative_to(variant), line


@probe_rule("KP203")
def own_namespace(subject: Subject, probed: Probed) -> Iterator[Finding]:
    for op in probed.foreign_ops:
        yield subject.find(
            f"loading registers operator {op!r}, outside the namespace {probed.namespace!r}",
            "register it through torch.library with its name written out, so that the build can rename it",
        )


@probe_rule("KP204")
def loads_without_triton(subject: Subject, probed: Probed) -> Iterator[Finding]:
    if probed.without_triton is not None:
        yield subject.find(
            f"does not load where Triton is not installed: {probed.without_triton}",
            "import Triton where its kernels are first called",
            severity="warning",
        )


@probe_rule("KP205")
def changes_nothing(subject: Subject, probed: Probed) -> Iterator[Finding]:
    for effect, file, line in probed.effects:
        path = _init_and_all(subject.directory)[0] if file is None else file
        yield subject.find(
            f"importing it {effect}", "move that into a function that the caller calls", path, line
        )


@probe_rule("KP206")
def loads_beside_another(subject: Subject, probed: Probed) -> Iterator[Finding]:
    if probed.twin_error is not None:
        yield subject.find(
            f"beside another build of it in one process: {probed.twin_error}",
            "keep all state within the package",
        )


@probe_rule("KP207")
def traceable(subject: Subject, probed: Probed) -> Iterator[Finding]:
    for op in probed.untraceable:
        yield subject.find(
            f"operator {op.partition('::')[2]!r} cannot be traced with fake tensors",
            "register an implementation by torch.library.register_fake",
            severity="warning",
        )
    in_a_test = "call it in a test, with torch.library.opcheck"
    for call in probed.calls:
        name = f"operator {call.op!r}"
        if call.fake == "failed":
            yield subject.find(
                f"{name} cannot be traced with fake tensors: {call.fake_why}",
                "mend its implementation by torch.library.register_fake",
                call.file or "",
                call.line,
                "warning",
            )
        elif call.fake == "not run":
            yield subject.find(
                f"the fake implementation of {name} was not run: no made-up arguments fitted ({call.fake_why})",
                in_a_test,
                severity="note",
            )
        elif call.real == "not run":
            yield subject.find(
                f"{name} was run on fake tensors alone: no made-up arguments fitted it ({call.real_why})",
                in_a_test,
                severity="note",
            )
        elif call.differs:
            yield subject.find(
                f"the fake implementation of {name} promised otherwise than it gave: {call.differs}",
                "if such arguments make sense, mend it",
                severity="note",
            )


@probe_rule("KP208")
def documented(subject: Subject, probed: Probed) -> Iterator[Finding]:
    for name, file, line in probed.undocumented:
        yield subject.find(f"{name} is public and has no docstring", "write one", file or "", line, "warning")
