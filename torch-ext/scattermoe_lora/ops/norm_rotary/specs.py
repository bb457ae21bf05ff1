"""The RMSNorm and rotary kernels to compile ahead of time: for Gemma 4's heads, and for an awkward one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..compile_spec import TARGETS, CompileSpec
from .gpu import OPTIONS, sizes_of
from .kernels import rotary_backward_kernel, rotary_forward_kernel

# (head_dim, rotated columns, heads, dtype): queries and keys of a sliding and of a global layer; values; and what needs
# most masks, a partial rotation of a size that is no power of two.
_USES = (
    (256, 256, 8, "bf16"),
    (512, 512, 8, "bf16"),
    (512, 512, 8, "fp32"),
    (512, 0, 4, "bf16"),
    (80, 32, 3, "fp16"),
)
_BACKWARD = {"NEED_X": True, "NEED_WEIGHT": False}


def _kind(name: str, dtype: str) -> str:
    """Pointers and the strides of rows are divisible by 16; counts of rows and blocks need not be."""
    if name.endswith("_ptr"):
        return "*fp32:16" if name == "d_weight_ptr" else f"*{dtype}:16"
    return "fp32" if name == "eps" else "i32:16" if name.startswith("stride") else "i32"


def _spec(kernel: Any, use: tuple[int, int, int, str], flags: dict[str, bool]) -> CompileSpec:
    head_dim, rotated, heads, dtype = use
    summed = flags.get("NEED_WEIGHT", False)
    constants: dict[str, Any] = {
        "HEADS": heads,
        "WEIGHTED": rotated > 0,
        **flags,
        **sizes_of(head_dim, rotated),
    }
    absent = [] if rotated else ["weight_ptr", "cos_ptr", "sin_ptr"]
    if kernel is rotary_backward_kernel and not summed:
        absent.append("d_weight_ptr")
    constants.update(dict.fromkeys(absent))
    arguments = {name: _kind(name, dtype) for name in kernel.arg_names if name not in constants}
    label = f"{dtype} {head_dim} rotated {rotated}{', d weight' if summed else ''}"
    return CompileSpec(kernel, label, arguments, constants, OPTIONS, TARGETS)


def _specs() -> Iterator[CompileSpec]:
    for use in _USES:
        yield _spec(rotary_forward_kernel, use, {})
        yield _spec(rotary_backward_kernel, use, _BACKWARD)
        if use[1]:
            yield _spec(rotary_backward_kernel, use, {**_BACKWARD, "NEED_WEIGHT": True})


COMPILE_SPECS = list(_specs())
