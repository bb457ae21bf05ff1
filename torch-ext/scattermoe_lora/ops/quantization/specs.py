"""The decode kernel to compile ahead of time: every way of storing elements and scales, to float32 and to bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..compile_spec import TARGETS, CompileSpec
from .formats import ELEMENTS
from .gpu import BLOCKS, OPTIONS
from .kernels import decode_kernel

# What a scale is stored as, the type of its pointer, and the block that shares one.
_FLAT = {"nf4": ("float", "fp32", 0), "nested nf4": ("float", "u8", 256)}
_GRIDS = {
    "float8": ("e4m3", "float", "fp32", 128, 128, False),
    "mxfp8": ("e4m3", "e8m0", "u8", 1, 32, False),
    "mxfp4": ("e2m1", "e8m0", "u8", 1, 32, False),
    "nvfp4": ("e2m1", "e4m3", "u8", 1, 16, True),
}


def _spec(label: str, pointer: str, dtype: str, element: str, constants: Mapping[str, Any]) -> CompileSpec:
    kind = ELEMENTS[element]
    values = {**constants, "BITS": kind.bits, "HIGH_FIRST": kind.high_first, "stride_sk": 1}
    blocks = {name: size for name, size in BLOCKS.items() if not name.startswith("num_")}
    kinds = {
        "codes_ptr": "*u8:16",
        "values_ptr": "*u8:16" if kind.bits == 8 else "*fp32:16",
        "scale_ptr": f"*{pointer}:16",
        "factor_ptr": "*fp32:16" if constants["FACTOR"] else f"*{pointer}:16",
        "experts_ptr": "*i32:16",
        "out_ptr": f"*{dtype}:16",
        "N": "i32:16",
        "K": "i32:16",
    }
    arguments = {
        name: kinds.get(name, "*fp32:16" if name.endswith("_ptr") else "i32")
        for name in decode_kernel.arg_names
        if name not in values and name not in blocks
    }
    options = {"num_warps": BLOCKS["num_warps"], **OPTIONS}
    return CompileSpec(
        decode_kernel, f"{label} to {dtype}", arguments, {**values, **blocks}, options, TARGETS
    )


def _specs() -> Iterator[CompileSpec]:
    for dtype in ("bf16", "fp32"):
        for label, (scale, pointer, nested) in _FLAT.items():
            flat = {"ROWS": 0, "COLUMNS": 64, "NESTED": nested, "SCALE": scale, "FACTOR": False}
            yield _spec(label, pointer, dtype, "nf4", flat)
        for label, (element, scale, pointer, rows, columns, factor) in _GRIDS.items():
            grid = {"ROWS": rows, "COLUMNS": columns, "NESTED": 0, "SCALE": scale, "FACTOR": factor}
            yield _spec(label, pointer, dtype, element, grid)


COMPILE_SPECS = list(_specs())
