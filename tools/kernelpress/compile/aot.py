"""Ahead-of-time compilation of a package's Triton kernels, without a GPU, and what each needs of its architecture.

What a package lists to be compiled is read by :mod:`kernelpress.compile.specs`.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from kernelpress.compile.interrupts import left_to_this_process
from kernelpress.compile.specs import MARK, TARGETS, CompileSpec, load_specs, modules_with_specs, name_of
from kernelpress.errors import BuildError
from kernelpress.findings.model import Finding


@dataclass(frozen=True)
class Compiled:
    """Resources of one compilation: bytes of shared memory a block, registers a thread, bytes a thread spilled.

    ``error`` is None, or says why it does not compile or fit; a kernel that does not compile needs nothing.
    ``measured`` says where and when the launch was timed; None: it was chosen without.
    """

    kernel: str
    label: str
    target: str
    shared: int = 0
    registers: int = 0
    spilled: int = 0
    error: str | None = None
    measured: str | None = None


def compile_package(
    package: Path, targets: Collection[str] = (), processes: int | None = None
) -> Iterator[Compiled]:
    """Compile all that a package lists, and yield results as they come.

    Args:
        package: The package's directory.
        targets: The architectures to compile for, keys of ``TARGETS``; all of them by default.
        processes: How many compile at once; by default as many as there are processors.

    Raises:
        BuildError: A target is unknown, the package lists nothing to compile for these targets, cannot be imported, its
            specifications do not fit its kernels, Triton interprets instead of compiling, or its compiler crashed.
    """
    targets = targets or TARGETS
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise BuildError(f"{', '.join(unknown)} is none of the targets {', '.join(TARGETS)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BuildError("TRITON_INTERPRET=1 makes Triton interpret, not compile; unset it")
    # Processes that are spawned take this path over.
    parent = str(package.resolve().parent)
    if parent not in sys.path:
        sys.path.insert(0, parent)
    jobs = [
        (module, index, target)
        for module in modules_with_specs(package.resolve())
        for index, spec in enumerate(load_specs(module))
        for target in spec.targets
        if target in targets
    ]
    if not jobs:
        raise BuildError(
            f"nothing to compile: no module of the package has a {MARK} for {', '.join(targets)}",
            path=package,
        )
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        with left_to_this_process():
            running = [pool.submit(_compile_job, *job) for job in jobs]
        try:
            for future in as_completed(running):
                yield future.result()
        except BrokenProcessPool as error:
            raise BuildError(
                "Triton's compiler crashed; compile one target at a time to find which", path=package
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _compile_job(module: str, index: int, target: str) -> Compiled:
    return compile_one(load_specs(module)[index], target)


def compile_one(spec: CompileSpec, target: str) -> Compiled:
    """Compile for one architecture. Failing to compile, or to fit shared memory, is a result with an ``error``."""
    compiled = compiled_kernel(spec, target)
    identity = (name_of(spec), spec.label, target)
    measured = getattr(spec, "measured", None)
    if isinstance(compiled, str):
        return Compiled(*identity, error=compiled, measured=measured)
    shared, limit = compiled.metadata.shared, TARGETS[target].shared_limit
    resources = _cuda_resources if TARGETS[target].backend == "cuda" else _hip_resources
    error = None if shared <= limit else f"needs {shared} bytes of shared memory, a block may have {limit}"
    return Compiled(*identity, shared, *resources(compiled.asm), error, measured)


def compiled_kernel(spec: CompileSpec, target: str) -> Any:
    """Triton's compiled kernel, whose ``asm`` holds every stage of its text; or why there is none, as a string."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, architecture = spec.kernel, TARGETS[target]
    types, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        kind, _, divisor = spec.arguments.get(argument, "constexpr").partition(":")
        types[argument] = kind
        if divisor:
            attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(kernel, types, dict(spec.constants), attributes)
    gpu = GPUTarget(architecture.backend, architecture.arch, architecture.warp_size)
    # What a launch does unless told otherwise; Triton warns where it is left open.
    options = {"enable_fp_fusion": True, **spec.options}
    try:
        return triton.compile(source, target=gpu, options=options)
    except (triton.TritonError, RuntimeError, ValueError, AssertionError) as caught:
        error: BaseException = caught
        # A kernel that calls others fails in each of them, outermost last.
        while error.__cause__ is not None:
            error = error.__cause__
        lines = [line for line in str(error).splitlines() if line.strip(" ^")]
        return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


def _cuda_resources(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Registers and the stack, which in a Triton kernel holds what was spilled, from the cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)


def _hip_resources(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Vector registers and scratch memory, from the metadata in the assembly."""
    assembly = asm["amdgcn"]
    return (
        _number(r"\.vgpr_count:\s*(\d+)", assembly),
        _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly),
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise BuildError(f"the compiler's output does not say {pattern!r}; this Triton writes another form")
    return int(match.group(1))


def table(results: Sequence[Compiled]) -> str:
    """Text for people: the most that any compilation of a kernel for a target needs, then each that spills or fails,
    and which launches were timed."""
    order = {target: position for position, target in enumerate(TARGETS)}
    ordered = sorted(results, key=lambda result: (result.kernel, order[result.target]))
    width = max(len(result.kernel) for result in results) + 2
    lines = [
        f"{'kernel':<{width}}{'target':<8}{'compiled':>9}{'shared':>9}{'of':>8}{'registers':>11}{'spilled':>9}{'spill':>7}"
        f"{'timed':>7}"
    ]
    for (kernel, target), group in groupby(ordered, key=lambda result: (result.kernel, result.target)):
        members = list(group)
        lines.append(
            f"{kernel:<{width}}{target:<8}{len(members):>9}{max(m.shared for m in members):>9}"
            f"{TARGETS[target].shared_limit:>8}{max(m.registers for m in members):>11}"
            f"{max(m.spilled for m in members):>9}{sum(m.spilled > 0 for m in members):>7}"
            f"{sum(m.measured is not None for m in members):>7}"
        )
    for title, chosen in (
        ("spills (bytes a thread)", [result for result in results if result.spilled and not result.error]),
        ("does not compile or fit", [result for result in results if result.error]),
    ):
        if chosen:
            lines.append(f"\n{title}:")
            lines += sorted(f"  {r.target:<8}{r.kernel} {r.label}: {r.error or r.spilled}" for r in chosen)
    for measured in sorted({result.measured for result in results if result.measured}):
        count = sum(result.measured == measured for result in results)
        lines.append(
            f"\nlaunches timed on {measured}: {count} of {len(results)} compilations; the others were not timed"
        )
    failed = sum(result.error is not None for result in results)
    return "\n".join((*lines, f"\n{len(results)} compilations, {failed} failed"))


def findings(results: Sequence[Compiled], package: Path) -> list[Finding]:
    """Rule KP401: an error for each compilation that fails or does not fit, a warning for each that spills."""
    unfit = []
    for result in results:
        compilation = f"{result.kernel} ({result.label}) for {result.target}"
        if result.error is not None:
            fix = "mend the kernel, or its specification"
            unfit.append(Finding("KP401", "error", package, None, f"{compilation}: {result.error}", fix))
        elif result.spilled:
            fix = "use smaller blocks or more warps"
            message = f"{compilation} spills {result.spilled} bytes a thread"
            unfit.append(Finding("KP401", "warning", package, None, message, fix))
    return sorted(unfit, key=lambda finding: finding.message)
