"""Everything that can be found wrong with a kernel: in its description, its sources, and the build of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kernelpress.builder.build import prepare
from kernelpress.builder.model import Build
from kernelpress.check.freshness import differing_variants, place_in_sources
from kernelpress.check.variants import check
from kernelpress.errors import KernelpressError, SpecError
from kernelpress.findings.model import Finding, FindingsError
from kernelpress.spec.load import KernelOptions


def check_kernel(options: KernelOptions, say: Callable[[str], None] = lambda text: None) -> list[Finding]:
    """Examine a kernel's sources and the variants in ``build/`` by every rule.

    A directory that holds nothing but a build is examined too, as far as that goes.

    Args:
        options: The kernel.
        say: Called with a line before what takes a while.

    Raises:
        CheckError: The sources are sound, and there is no build.
    """
    directory = options.directory / "build"
    if not options.describes():
        return check(directory, say)
    findings, kernel = check_sources(options)
    # Sources that cannot be built may leave no build behind; then the findings in them are the answer.
    if not directory.is_dir() and any(finding.severity == "error" for finding in findings):
        return findings
    built = check(directory, say)
    if kernel is None:
        return [*findings, *built]
    stale = differing_variants(kernel, directory)
    # Lines of a build of other sources say nothing of these.
    return [*findings, *stale, *(built if stale else place_in_sources(built, kernel, directory))]


def check_sources(options: KernelOptions) -> tuple[list[Finding], Build | None]:
    """The findings in a kernel's description and sources, and the build of them; ``None`` where there can be none."""
    try:
        kernel = prepare(options.load())
    except FindingsError as error:
        return list(error.findings), None
    except KernelpressError as error:
        code = "KP001" if isinstance(error, SpecError) else "KP002"
        return [Finding(code, "error", error.path or Path(), error.line, error.message, "correct it")], None
    return list(kernel.findings), kernel
