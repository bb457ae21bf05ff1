"""The rule that compiles: Triton kernels with a specification, for the architectures that they name."""

from __future__ import annotations

import os

from kernelpress.errors import BuildError
from kernelpress.findings import Finding
from kernelpress.spec_model import Spec


def check_compilation(spec: Spec) -> list[Finding]:
    """Compile what the package lists in ``COMPILE_SPECS``; nothing where it lists nothing.

    Returns:
        A finding for each kernel and architecture that does not compile or fit, and a warning for one that spills.
    """
    from kernelpress.aot import TARGETS, compile_package, modules_with_specs

    package = spec.package_dir
    if not modules_with_specs(package.resolve()):
        return []
    found = []
    try:
        for done in compile_package(package, list(TARGETS), os.cpu_count() or 1):
            what = f"{done.kernel} ({done.label}) for {done.target}"
            if done.error is not None:
                fix = "mend the kernel, or its specification"
                found.append(Finding("KP401", "error", package, None, f"{what}: {done.error}", fix))
            elif done.spilled:
                fix = "use smaller blocks or more warps"
                message = f"{what} spills {done.spilled} bytes a thread"
                found.append(Finding("KP401", "warning", package, None, message, fix))
    except BuildError as error:
        found.append(Finding("KP401", "error", package, None, error.message, "correct COMPILE_SPECS"))
    return sorted(found, key=lambda each: each.message)
