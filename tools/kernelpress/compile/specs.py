"""Triton kernels that a package lists to be compiled ahead of time, and the architectures to compile for.

A package says what to compile in ``COMPILE_SPECS``, a list at the top level of any of its modules, of objects with
the attributes of :class:`CompileSpec`. Only the modules that hold one are imported.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kernelpress.errors import BuildError

MARK = "COMPILE_SPECS"


@dataclass(frozen=True)
class Target:
    """An architecture: its name for Triton, threads a warp, and the most shared memory a block may ask for."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


# Shared memory a block: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (a kilobyte of
# the multiprocessor's is the system's), and 64 KB of LDS in AMD's CDNA 2 and CDNA 3 instruction set guides.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_86": Target("cuda", 86, 32, 99 * 1024),
    "sm_89": Target("cuda", 89, 32, 99 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "sm_120": Target("cuda", 120, 32, 99 * 1024),
    "gfx90a": Target("hip", "gfx90a", 64, 64 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


class CompileSpec(Protocol):
    """One compilation of one kernel.

    Attributes:
        kernel: The ``@triton.jit`` function.
        label: Tells this compilation from the kernel's others.
        arguments: For each argument that is not in ``constants`` its type as Triton writes it (``*bf16``, ``i32``),
            with ``:16`` after it where the value is divisible by 16. Triton turns an integer that equals 1 into a
            constant: such an argument is in ``constants`` as 1.
        constants: Values of the ``tl.constexpr`` arguments.
        options: ``num_warps``, ``num_stages``.
        targets: The architectures it ships for, keys of :data:`TARGETS`.

    One that also has ``measured``, text or None, says where and when this launch was timed.
    """

    @property
    def kernel(self) -> Any: ...
    @property
    def label(self) -> str: ...
    @property
    def arguments(self) -> Mapping[str, str]: ...
    @property
    def constants(self) -> Mapping[str, Any]: ...
    @property
    def options(self) -> Mapping[str, int]: ...
    @property
    def targets(self) -> Collection[str]: ...


def modules_with_specs(package: Path) -> list[str]:
    """Names of the modules of ``package`` that assign ``COMPILE_SPECS``, found without importing any.

    Args:
        package: The package's directory; its name is the package's.

    Raises:
        BuildError: A module is not valid Python.
    """
    names = []
    for path in sorted(package.rglob("*.py")):
        try:
            statements = ast.parse(path.read_bytes()).body
        except SyntaxError as error:
            raise BuildError(f"not valid Python: {error.msg}", path=path, line=error.lineno) from error
        targets = [
            target
            for statement in statements
            if isinstance(statement, ast.Assign | ast.AnnAssign)
            for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
        ]
        if any(isinstance(target, ast.Name) and target.id == MARK for target in targets):
            parts = path.relative_to(package.parent).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def load_specs(module: str) -> Sequence[CompileSpec]:
    """Import ``module`` and return its ``COMPILE_SPECS``.

    Raises:
        BuildError: The module cannot be imported, or one of its specifications names an argument that its kernel has
            not, leaves one out, or names no target that kernelpress knows.
    """
    try:
        specs: Sequence[CompileSpec] = getattr(importlib.import_module(module), MARK)
        for spec in specs:
            _check(spec, f"{module}.{MARK}: {name_of(spec)} {spec.label}")
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(f"cannot import {module}: {type(error).__name__}: {error}") from error
    return specs


def _check(spec: CompileSpec, where: str) -> None:
    expected, listed = set(spec.kernel.arg_names), [*spec.arguments, *spec.constants]
    if sorted(listed) != sorted(expected):
        raise BuildError(
            f"{where}: every argument stands once in `arguments` or `constants`; "
            f"missing {sorted(expected - set(listed))}, unknown {sorted(set(listed) - expected)}"
        )
    if unknown := sorted(set(spec.targets) - set(TARGETS)):
        raise BuildError(f"{where}: targets {unknown} are none of {list(TARGETS)}")


def name_of(spec: CompileSpec) -> str:
    """The kernel's name."""
    return str(spec.kernel.__name__)
