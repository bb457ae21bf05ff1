"""Compiles a package's Triton kernels ahead of time, with no GPU, and says what each needs of its architecture.

    python -m kernelpress.aot [DIRECTORY] [--target sm_90 ...]

What a package says to compile is in :mod:`kernelpress.specifications`.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

from kernelpress.errors import BuildError, KernelpressError
from kernelpress.interrupts import left_to_this_process
from kernelpress.spec import load_spec
from kernelpress.specifications import (
    MARK,
    TARGETS,
    Specification,
    load_specifications,
    modules_with_specs,
    name_of,
)


@dataclass(frozen=True)
class Compiled:
    """What one compilation needs: bytes of shared memory a block, registers a thread, bytes a thread spilled to memory.

    ``error`` is None, or says why it does not compile or fit; a kernel that does not compile needs nothing.
    """

    kernel: str
    label: str
    target: str
    shared: int = 0
    registers: int = 0
    spilled: int = 0
    error: str | None = None


def compile_one(specification: Specification, target: str) -> Compiled:
    """Compile for one architecture. Failing to compile, or to fit shared memory, is a result with an ``error``."""
    compiled = compiled_kernel(specification, target)
    identity = (name_of(specification), specification.label, target)
    if isinstance(compiled, str):
        return Compiled(*identity, error=compiled)
    shared, limit = compiled.metadata.shared, TARGETS[target].shared_limit
    needs = _cuda_needs if TARGETS[target].backend == "cuda" else _hip_needs
    error = None if shared <= limit else f"needs {shared} bytes of shared memory, a block may have {limit}"
    return Compiled(*identity, shared, *needs(compiled.asm), error)


def compiled_kernel(specification: Specification, target: str) -> Any:
    """Triton's compiled kernel, whose ``asm`` holds every stage of its text; or why there is none, as a string."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, architecture = specification.kernel, TARGETS[target]
    types, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        kind, _, divisor = specification.arguments.get(argument, "constexpr").partition(":")
        types[argument] = kind
        if divisor:
            attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(kernel, types, dict(specification.constants), attributes)
    gpu = GPUTarget(architecture.backend, architecture.arch, architecture.warp_size)
    # What a launch does unless told otherwise; Triton warns where it is left open.
    options = {"enable_fp_fusion": True, **specification.options}
    try:
        return triton.compile(source, target=gpu, options=options)
    except (triton.TritonError, RuntimeError, ValueError, AssertionError) as caught:
        error: BaseException = caught
        # A kernel that calls others fails in each of them, outermost last.
        while error.__cause__ is not None:
            error = error.__cause__
        lines = [line for line in str(error).splitlines() if line.strip(" ^")]
        return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


def _cuda_needs(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Registers and the stack, which in a Triton kernel holds what was spilled, from the cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        told = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return _number(r"REG:(\d+)", told), _number(r"STACK:(\d+)", told)


def _hip_needs(asm: Mapping[str, Any]) -> tuple[int, int]:
    """Vector registers and scratch memory, from the metadata in the assembly."""
    told = asm["amdgcn"]
    return _number(r"\.vgpr_count:\s*(\d+)", told), _number(r"\.private_segment_fixed_size:\s*(\d+)", told)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise BuildError(f"the compiler's output does not say {pattern!r}; this Triton writes another form")
    return int(found.group(1))


def _compile_in_worker(module: str, index: int, target: str) -> Compiled:
    return compile_one(load_specifications(module)[index], target)


def _start_worker(parent: str) -> None:
    sys.path.insert(0, parent)


def compile_package(package: Path, targets: Collection[str], processes: int) -> Iterator[Compiled]:
    """Compile all that a package ships for ``targets``, in ``processes`` processes, and yield results as they come.

    Raises:
        BuildError: The package says nothing to compile for these targets, cannot be imported, its specifications do
            not fit its kernels, Triton interprets instead of compiling, or its compiler crashed.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BuildError("TRITON_INTERPRET=1 makes Triton interpret, not compile; unset it")
    parent = str(package.resolve().parent)
    if parent not in sys.path:
        sys.path.insert(0, parent)
    jobs = []
    for module in modules_with_specs(package.resolve()):
        try:
            specifications = load_specifications(module)
        except BuildError:
            raise
        except Exception as error:
            raise BuildError(
                f"cannot import {module}: {type(error).__name__}: {error}", path=package
            ) from error
        jobs += [
            (module, index, target)
            for index, specification in enumerate(specifications)
            for target in specification.targets
            if target in targets
        ]
    if not jobs:
        raise BuildError(
            f"nothing to compile: no module of the package has a {MARK} for {', '.join(targets)}",
            path=package,
        )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker, (parent,)) as pool:
        with left_to_this_process():
            running = [pool.submit(_compile_in_worker, *job) for job in jobs]
        try:
            for done in as_completed(running):
                yield done.result()
        except BrokenProcessPool as error:
            raise BuildError(
                "Triton's compiler crashed; compile one target at a time to find which", path=package
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def table(results: Sequence[Compiled]) -> str:
    """For each kernel and architecture the most that any of its compilations needs, then each that spills or fails."""
    order = {target: place for place, target in enumerate(TARGETS)}
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for each in sorted(results, key=lambda r: (r.kernel, order[r.target], r.label)):
        groups.setdefault((each.kernel, each.target), []).append(each)
    width = max(len(kernel) for kernel, _ in groups) + 2
    lines = [
        f"{'kernel':<{width}}{'target':<8}{'compiled':>9}{'shared':>9}{'of':>8}{'registers':>11}{'spilled':>9}{'spill':>7}"
    ]
    for (kernel, target), members in groups.items():
        spilling = sum(m.spilled > 0 for m in members)
        lines.append(
            f"{kernel:<{width}}{target:<8}{len(members):>9}{max(m.shared for m in members):>9}"
            f"{TARGETS[target].shared_limit:>8}{max(m.registers for m in members):>11}"
            f"{max(m.spilled for m in members):>9}{spilling:>7}"
        )
    for title, chosen in (
        ("spills (bytes a thread)", [r for r in results if r.spilled and not r.error]),
        ("does not compile or fit", [r for r in results if r.error]),
    ):
        if chosen:
            lines.append(f"\n{title}:")
            lines += sorted(f"  {r.target:<8}{r.kernel} {r.label}: {r.error or r.spilled}" for r in chosen)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: prints the table; the status is 1 where a kernel does not compile or fit."""
    parser = argparse.ArgumentParser(
        prog="python -m kernelpress.aot", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("directory", type=Path, nargs="?", default=Path(), help="holds build.toml")
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), help="only this one; may be repeated"
    )
    options = parser.parse_args(arguments)
    try:
        results = list(
            compile_package(
                load_spec(options.directory).package_dir, options.target or list(TARGETS), os.cpu_count() or 1
            )
        )
    except KernelpressError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(results))
    failed = sum(each.error is not None for each in results)
    print(f"\n{len(results)} compilations, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
