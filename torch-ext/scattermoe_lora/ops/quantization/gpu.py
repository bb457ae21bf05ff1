"""Triton implementation: launches of the kernel that decodes matrices into a workspace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from .formats import ELEMENTS, element_values
from .kernels import decode_kernel
from .stack import QuantizedStack

_KINDS = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}
BLOCKS = {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4}
# A fused multiply-add would round scales that are quantized themselves otherwise than bitsandbytes does.
OPTIONS = {"enable_fp_fusion": False}


class Operands(NamedTuple):
    """A stack as ``decode_tile`` takes it.

    Attributes:
        pointers: Its first arguments, from ``codes_ptr`` to ``offset_ptr``.
        strides: Its last arguments that are not constants, from ``stride_se`` to ``stride_f``.
        constants: Those that are, but for the block.
    """

    pointers: tuple[torch.Tensor, ...]
    strides: tuple[int, ...]
    constants: dict[str, Any]


def kernel_operands(stack: QuantizedStack) -> Operands:
    """The arguments for tiles of a stack."""
    layout, codes = stack.format, stack.codes
    element = ELEMENTS[layout.element]
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
            "ROWS": layout.rows,
            "COLUMNS": layout.columns,
            "NESTED": layout.nested,
            "SCALE": kind,
            "FACTOR": factor is not None,
        },
    )


def decode(stack: QuantizedStack, experts: Sequence[int], out: torch.Tensor) -> torch.Tensor:
    """See :func:`scattermoe_lora.ops.quantization.decode.decode`."""
    _, n, k = stack.stored_shape
    operands = kernel_operands(stack)
    # A range is written by the device; a list would be copied to it.
    if isinstance(experts, range):
        numbers = torch.arange(experts.start, experts.stop, experts.step, device=stack.device)
    else:
        numbers = torch.tensor(experts, device=stack.device)
    tiles = triton.cdiv(n, BLOCKS["BLOCK_N"]) * triton.cdiv(k, BLOCKS["BLOCK_K"])
    decode_kernel[(tiles, len(experts))](
        *operands.pointers,
        numbers.int(),
        out,
        n,
        k,
        *operands.strides,
        **operands.constants,
        **BLOCKS,
        **OPTIONS,
    )
    return out
