"""The RMSNorm kernels to compile ahead of time: for Gemma 4's hidden sizes, and for an awkward one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..compile_spec import TARGETS, CompileSpec
from .gpu import constants_of
from .kernels import rms_backward_kernel, rms_forward_kernel

# E2B's and 31B's, with most warps; and one that needs masks.
_SIZES = ((1536, "bf16"), (5376, "bf16"), (5376, "fp32"), (80, "fp16"))


def _kind(name: str, dtype: str) -> str:
    """Pointers and strides of rows are divisible by 16; counts of rows and blocks need not be."""
    if name.endswith("_ptr"):
        return "*fp32:16" if name == "d_weight_ptr" else f"*{dtype}:16"
    if name in ("eps", "offset"):
        return "fp32"
    return "i32:16" if name == "H" or name.startswith("stride") else "i32"


def _specs() -> Iterator[CompileSpec]:
    for size, dtype in _SIZES:
        for kernel, flags, label in _uses():
            constants: dict[str, Any] = {**flags, **constants_of(size)}
            options = {"num_warps": constants.pop("num_warps")}
            absent = {
                "residual_ptr": not flags["ADD"],
                "d_total_ptr": not flags["ADD"],
                "total_ptr": False,
                "weight_ptr": not flags["WEIGHTED"],
                "d_weight_ptr": not flags.get("NEED_WEIGHT"),
            }
            constants |= {name: None for name in kernel.arg_names if absent.get(name)}
            arguments = {name: _kind(name, dtype) for name in kernel.arg_names if name not in constants}
            yield CompileSpec(kernel, f"{dtype} {size}{label}", arguments, constants, options, TARGETS)


def _uses() -> Iterator[tuple[Any, dict[str, bool], str]]:
    """Kernels, their flags and a label for them."""
    for add in (False, True):
        for weighted in (False, True):
            label = f"{', added' if add else ''}{', weighted' if weighted else ''}"
            flags = {"ADD": add, "WEIGHTED": weighted}
            yield rms_forward_kernel, {**flags, "ROUND_FIRST": False}, label
            yield rms_backward_kernel, {**flags, "NEED_X": True, "NEED_WEIGHT": False}, label
        flags = {"ADD": add, "WEIGHTED": True}
        yield rms_forward_kernel, {**flags, "ROUND_FIRST": True}, f"{', added' if add else ''}, rounded first"
        yield (
            rms_backward_kernel,
            {**flags, "NEED_X": True, "NEED_WEIGHT": True},
            f"{', added' if add else ''}, d weight",
        )


COMPILE_SPECS = list(_specs())
