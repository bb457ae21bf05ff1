"""Triton implementation: launches of the kernel that decodes matrices into a workspace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..launch import cdiv
from ..launcher import launch_kernel
from .formats import ELEMENTS, element_values
from .kernels import decode_kernel
from .stack import QuantizedStack

# Of eight codes. Shifted right, an unsigned one brings in zeros.
_WORDS = {4: torch.uint32, 8: torch.uint64}
_KINDS = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}
BLOCKS = {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4}
# A fused multiply-add would round scales that are quantized themselves otherwise than bitsandbytes does.
OPTIONS = {"enable_fp_fusion": False}


# Codes that are read as one word.
RUN = 8


class Operands(NamedTuple):
    """A stack as ``load_tile`` and ``decode_tile`` take it.

    Attributes:
        pointers: Codes, the values of 4-bit codes, and the pointers from ``scale_ptr`` to ``offset_ptr``.
        strides: From ``stride_se`` to ``stride_f``.
        constants: Those of the format, from ``BITS`` to ``FACTOR``.
    """

    pointers: tuple[torch.Tensor, ...]
    strides: tuple[int, ...]
    constants: dict[str, Any]


def run_length(stack: QuantizedStack) -> int:
    """``RUN``, or 1 where eight consecutive codes may not be one aligned word of one row that shares a scale.

    Words are counted in 32 bits.
    """
    bits = ELEMENTS[stack.format.element].bits
    is_even = stack.stored_shape[2] % RUN == 0 and stack.format.columns % RUN == 0
    fits = stack.codes.numel() * 8 // bits < RUN << 31
    return RUN if is_even and fits and stack.codes.data_ptr() % bits == 0 else 1


def kernel_operands(stack: QuantizedStack) -> Operands:
    """The arguments for tiles of a stack."""
    layout, run = stack.format, run_length(stack)
    element = ELEMENTS[layout.element]
    codes = stack.codes if run == 1 else stack.codes.view(_WORDS[element.bits])
    scale, *rest = stack.scales
    kind = _KINDS.get(scale.dtype, "float")
    # Pointers that are not used still have to be pointers.
    values = codes if element.bits == 8 else element_values(layout.element, stack.device)
    pointer = scale if kind == "float" else scale.view(torch.uint8)
    nested = rest if layout.nested else [pointer] * 3
    factor = rest[0] if rest and not layout.nested else None
    return Operands(
        (codes, values, pointer, pointer if factor is None else factor, *nested),
        (*((0, 0, 0) if layout.is_flat else scale.stride()), 0 if factor is None else factor.stride(0)),
        {
            "BITS": element.bits,
            "HIGH_FIRST": element.high_first,
            "RUN": run,
            "ROWS": layout.rows,
            "COLUMNS": layout.columns,
            "NESTED": layout.nested,
            "SCALE": kind,
            "FACTOR": factor is not None,
        },
    )


def decode(
    stack: QuantizedStack, experts: Sequence[int], out: torch.Tensor, operands: Operands | None = None
) -> torch.Tensor:
    """See :func:`scattermoe_lora.ops.quantization.decode.decode`; ``operands`` are those of the stack, if at hand."""
    _, n, k = stack.stored_shape
    operands = operands or kernel_operands(stack)
    # Consecutive numbers need no list, which would be copied to the device.
    is_listed = not (isinstance(experts, range) and experts.step == 1)
    numbers = torch.tensor(experts, dtype=torch.int32, device=stack.device) if is_listed else out
    tiles = cdiv(n, BLOCKS["BLOCK_N"]) * cdiv(k, BLOCKS["BLOCK_K"])
    launch_kernel(
        decode_kernel,
        (tiles, len(experts), 1),
        (*operands.pointers, numbers, out, experts[0], n, k, *operands.strides),
        {"LISTED": is_listed, **operands.constants, **BLOCKS, **OPTIONS},
    )
    return out
