"""The decode kernel to compile ahead of time: every way of storing elements and scales, to float32 and to bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compile_spec import TARGETS, CompileSpec
from .formats import ELEMENTS
from .gpu import BLOCKS, OPTIONS, RUN
from .kernels import decode_kernel


@dataclass(frozen=True)
class Storage:
    """A way of storing elements and scales.

    Attributes:
        label: The format's name.
        element: A key of :data:`scattermoe_lora.ops.quantization.formats.ELEMENTS`.
        scale, pointer: How a scale is stored, see ``load_scale``, and the type that Triton reads.
        rows, columns, nested, factor: The block that shares a scale, see ``decode_tile``.
    """

    label: str
    element: str
    scale: str
    pointer: str
    rows: int
    columns: int
    nested: int = 0
    factor: bool = False

    def constants(self) -> dict[str, Any]:
        """The constants of ``decode_tile`` but for the block."""
        kind = ELEMENTS[self.element]
        return {
            "BITS": kind.bits,
            "HIGH_FIRST": kind.high_first,
            "RUN": RUN,
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "NESTED": self.nested,
            "SCALE": self.scale,
            "FACTOR": self.factor,
            "stride_sk": 1,
        }

    def types(self) -> dict[str, str]:
        """The types of its pointers and strides."""
        numbers = "*fp32:16"
        bits = ELEMENTS[self.element].bits
        words = f"*u{RUN * bits}:16"
        return {
            "codes_ptr": words,
            "values_ptr": words if bits == 8 else numbers,
            "scale_ptr": f"*{self.pointer}:16",
            "factor_ptr": numbers if self.factor else f"*{self.pointer}:16",
            **dict.fromkeys(("nested_values_ptr", "nested_ptr", "offset_ptr"), numbers),
            **dict.fromkeys(("stride_se", "stride_sn", "stride_f"), "i32"),
        }


STORAGES = (
    Storage("nf4", "nf4", "float", "fp32", 0, 64),
    Storage("nested nf4", "nf4", "float", "u8", 0, 64, nested=256),
    Storage("float8", "e4m3", "float", "fp32", 128, 128),
    Storage("mxfp8", "e4m3", "e8m0", "u8", 1, 32),
    Storage("mxfp4", "e2m1", "e8m0", "u8", 1, 32),
    Storage("nvfp4", "e2m1", "e4m3", "u8", 1, 16, factor=True),
)


def _spec(storage: Storage, dtype: str) -> CompileSpec:
    blocks = {name: size for name, size in BLOCKS.items() if not name.startswith("num_")}
    own = {
        "experts_ptr": f"*{dtype}:16",
        "out_ptr": f"*{dtype}:16",
        "first": "i32",
        "N": "i32:16",
        "K": "i32:16",
    }
    own["codes_ptr"] = storage.types()["codes_ptr"].removesuffix(":16")
    constants = {**storage.constants(), "LISTED": False, **blocks}
    options = {"num_warps": BLOCKS["num_warps"], **OPTIONS}
    arguments = {**storage.types(), **own}
    return CompileSpec(decode_kernel, f"{storage.label} to {dtype}", arguments, constants, options, TARGETS)


COMPILE_SPECS = [_spec(storage, dtype) for dtype in ("bf16", "fp32") for storage in STORAGES]
