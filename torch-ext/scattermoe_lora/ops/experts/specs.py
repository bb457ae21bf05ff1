"""What ships of the gated activation, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..activation import ACTIVATIONS
from ..compile_spec import TARGETS, CompileSpec
from .kernels import gate_backward_kernel, gate_forward_kernel

# gpt-oss's, beside the plain ones.
_CLAMPED = {"ACTIVATION": "silu", "INTERLEAVED": True, "ALPHA": 1.702, "LIMIT": 7.0, "SHIFT": 1.0}
_POINTERS = {
    "row_weight_ptr": "*fp32:16",
    "d_row_weight_ptr": "*fp32:16",
    "order_ptr": "*i64:16",
}


def _specs() -> Iterator[CompileSpec]:
    gates: dict[str, dict[str, Any]] = {
        name: {"ACTIVATION": name, "INTERLEAVED": False, "ALPHA": 1.0, "LIMIT": None, "SHIFT": 0.0}
        for name in ACTIVATIONS
    }
    for label, gate in {**gates, "clamped silu": _CLAMPED}.items():
        for kernel in (gate_forward_kernel, gate_backward_kernel):
            for dtype in ("bf16", "fp32"):
                for block in (128, 1024):
                    arguments = {
                        name: _POINTERS.get(name, f"*{dtype}:16") if name.endswith("_ptr") else "i32:16"
                        for name in kernel.arg_names
                        if name not in gate and name != "BLOCK"
                    }
                    constants = {**gate, "BLOCK": block}
                    yield CompileSpec(
                        kernel, f"{label} {dtype} {block}", arguments, constants, {"num_warps": 4}, TARGETS
                    )


COMPILE_SPECS = list(_specs())
