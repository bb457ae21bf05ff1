"""One compilation of a kernel ahead of time, as data: see ``COMPILE_SPECS`` beside each operator's kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")


@dataclass(frozen=True)
class CompileSpec:
    """One compilation of one kernel.

    Attributes:
        kernel: The ``@triton.jit`` function.
        label: Tells this compilation from the kernel's others.
        arguments: Types of the run-time arguments as Triton writes them, with ``:16`` after them where the launches
            that matter pass a value divisible by 16.
        constants: Values of the ``tl.constexpr`` arguments, and of integers that are 1 at launch, which Triton makes
            constant too.
        options: ``num_warps``, ``num_stages``.
        targets: The architectures it ships for.
        measured: The GPU on which this launch was timed and the date, for the report; None where it was not.
    """

    kernel: Any
    label: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    targets: tuple[str, ...]
    measured: str | None = None


def distinct(specs: Iterable[CompileSpec]) -> list[CompileSpec]:
    """The specifications without those that compile once more what one before them compiles: rules share launches."""
    by_content = {
        (spec.kernel.__name__, spec.label, spec.targets, *spec.constants.items(), *spec.options.items()): spec
        for spec in reversed(list(specs))
    }
    return list(reversed(by_content.values()))
