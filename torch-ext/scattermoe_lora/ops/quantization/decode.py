"""Decoding some of a stack's matrices into a workspace, on the device that they are on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import dispatch
from . import cpu
from .stack import QuantizedStack


def decode(
    stack: QuantizedStack,
    experts: Sequence[int] | slice,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense matrices of some experts, ``[len(experts), N, K]``; nothing else of their size is kept.

    Args:
        stack: Quantized matrices.
        experts: Their numbers.
        dtype: float32, bfloat16 or float16; by default the dtype that the stack stands for.
        out: Where to: contiguous of the result's shape (of the stored matrices' shape where the stack is transposed),
            dtype and device, or None.

    Returns:
        ``out``, or a new tensor; a transposed view of it where the stack is transposed.
    """
    numbers = range(stack.codes.shape[0])[experts] if isinstance(experts, slice) else experts
    if out is None:
        out = torch.empty(
            (len(numbers), *stack.stored_shape[1:]), dtype=dtype or stack.dtype, device=stack.device
        )
    if numbers:
        if dispatch.use_triton(out):
            from . import gpu

            gpu.decode(stack, numbers, out)
        else:
            cpu.decode(stack, numbers, out)
    return out.mT if stack.format.transposed else out
