"""The Triton kernels compile ahead of time, without a GPU, for the architectures that users have."""

from __future__ import annotations

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INTEGERS = {
    "order_ptr": "*i64",
    "offsets_ptr": "*i64",
    "row_weight_ptr": "*fp32",
    "d_row_weight_ptr": "*fp32",
}
PLAIN = {"INTERLEAVED": False, "ALPHA": 1.0, "LIMIT": None, "SHIFT": 0.0}
CLAMPED = {"INTERLEAVED": True, "ALPHA": 1.702, "LIMIT": 7.0, "SHIFT": 1.0}
KERNELS = {
    "grouped_matmul_kernel": (
        "ops.grouped_linear.kernels",
        {
            "GATHER": True,
            "TOP_K": 8,
            "SCATTER": True,
            "LOW_RANK": True,
            "BIAS": True,
            "WEIGHTED": True,
            "EXPERTS_POW2": 256,
            "PRECISION": "ieee",
            "BLOCK_M": 64,
            "BLOCK_N": 64,
            "BLOCK_K": 32,
        },
    ),
    "grouped_outer_kernel": (
        "ops.grouped_linear.kernels",
        {
            "GATHER_P": True,
            "GATHER_Q": True,
            "TOP_K": 8,
            "WEIGHTED": True,
            "PRECISION": "ieee",
            "BLOCK_P": 64,
            "BLOCK_Q": 64,
            "BLOCK_S": 32,
        },
    ),
    "gate_forward_kernel": ("ops.experts.kernels", {**CLAMPED, "ACTIVATION": "silu", "BLOCK": 1024}),
    "gate_backward_kernel": ("ops.experts.kernels", {**PLAIN, "ACTIVATION": "gelu", "BLOCK": 1024}),
}
# The least shared memory a block may use on any of the targets: 64 KB of LDS on gfx942.
SHARED_LIMIT = 64 * 1024


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_and_fits(submodule, name: str, target: str) -> None:
    module, constants = KERNELS[name]
    function = getattr(submodule(module), name)

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        return INTEGERS.get(argument, "*bf16" if argument.endswith("_ptr") else "i32")

    source = ASTSource(fn=function, signature={a: kind(a) for a in function.arg_names}, constexprs=constants)
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": 4})
    assert compiled.metadata.shared <= SHARED_LIMIT
    assert compiled.asm["hsaco" if target.startswith("gfx") else "cubin"]
