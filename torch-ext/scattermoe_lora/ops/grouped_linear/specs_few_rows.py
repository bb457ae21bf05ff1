"""The product that decodes a quantized weight, to compile ahead of time: every format, as stored and transposed."""

from __future__ import annotations

from ..compile_spec import TARGETS, CompileSpec
from ..quantization.gpu import OPTIONS
from ..quantization.specs import STORAGES, Storage
from .few_rows import blocks_for
from .kernels_few_rows import quantized_matmul_kernel
from .specs import POINTERS


def _spec(storage: Storage, dtype: str, transposed: bool) -> CompileSpec:
    blocks = blocks_for(2 if dtype == "bf16" else 4, 16)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    # All that any of the products asks for: the first of a layer gathers, the last has weights and scatters.
    constants = {
        **storage.constants(),
        **dict.fromkeys(("GATHER", "SCATTER", "LOW_RANK", "BIAS", "WEIGHTED"), True),
        "TRANSPOSED": transposed,
        "TOP_K": 8,
        "EXPERTS_POW2": 256,
        "PRECISION": "ieee",
        **({"stride_bn": 1} if transposed else {"stride_br": 1}),
        **blocks,
    }
    types = {**storage.types(), **POINTERS, **dict.fromkeys(("pairs", "num_experts"), "i32")}
    arguments = {
        name: types.get(name, f"*{dtype}:16" if name.endswith("_ptr") else "i32:16")
        for name in quantized_matmul_kernel.arg_names
        if name not in constants
    }
    label = f"{storage.label}{' transposed' if transposed else ''} {dtype}"
    return CompileSpec(quantized_matmul_kernel, label, arguments, constants, {**options, **OPTIONS}, TARGETS)


COMPILE_SPECS = [
    _spec(storage, dtype, transposed)
    for storage in STORAGES
    for dtype in ("bf16", "fp32")
    for transposed in (False, True)
]
