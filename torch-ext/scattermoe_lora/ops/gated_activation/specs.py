"""The kernels of a gated activation to compile ahead of time."""

from __future__ import annotations

import torch

from ..activation import ACTIVATIONS
from ..compile_spec import TARGETS, CompileSpec
from .gpu import constants_of
from .kernels import gated_backward_kernel, gated_forward_kernel

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Rows of Gemma 4's MLP, and short ones.
COMPILE_SPECS = [
    CompileSpec(
        kernel,
        f"{activation} {name} {columns}",
        {
            argument: f"*{name}:16" if argument.endswith("_ptr") else "i32:16"
            for argument in kernel.arg_names
            if argument not in constants
        },
        constants,
        {"num_warps": 4},
        TARGETS,
    )
    for kernel in (gated_forward_kernel, gated_backward_kernel)
    for activation in ACTIVATIONS
    for name, dtype in _DTYPES.items()
    for columns in (64, 8448)
    for constants in (constants_of(dtype, columns, activation),)
]
