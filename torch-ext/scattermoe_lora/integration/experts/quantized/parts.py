"""Parts of a quantized stack along its experts, as processes hold them that share one (FSDP2, expert parallelism)."""

from __future__ import annotations

from dataclasses import replace

import torch

from ....ops.quantization.reference import flat_scales
from ....ops.quantization.stack import QuantizedStack


def plain_scales(stack: QuantizedStack) -> QuantizedStack:
    """The same matrices with scales that are numbers: float32 of the same bits in the place of codes for them."""
    if not stack.format.nested:
        return stack
    layout = replace(stack.format, nested=0)
    return QuantizedStack(stack.codes, (flat_scales(stack),), layout, stack.dtype)


def take_experts(stack: QuantizedStack, start: int, end: int) -> QuantizedStack:
    """The stack of experts ``start`` to ``end``, of the same storage.

    Raises:
        NotImplementedError: A block of elements that share a scale runs from one expert to the next.
    """
    stack = plain_scales(stack)
    if stack.format.is_flat:
        ends = (_blocks(stack, start), _blocks(stack, end))
        scales: tuple[torch.Tensor, ...] = (stack.scales[0][slice(*ends)],)
    else:
        scales = tuple(scale[start:end] for scale in stack.scales)
    return QuantizedStack(stack.codes[start:end], scales, stack.format, stack.dtype)


def zeros(stack: QuantizedStack, experts: int) -> QuantizedStack:
    """A stack of another number of experts, all of whose codes and scales are zero."""
    stack = plain_scales(stack)
    sizes = [_blocks(stack, experts)] if stack.format.is_flat else [experts] * len(stack.scales)
    scales = tuple(
        scale.new_zeros((size, *scale.shape[1:])) for scale, size in zip(stack.scales, sizes, strict=True)
    )
    codes = stack.codes.new_zeros((experts, *stack.codes.shape[1:]))
    return QuantizedStack(codes, scales, stack.format, stack.dtype)


def _blocks(stack: QuantizedStack, experts: int) -> int:
    """The number of flat blocks in the first experts."""
    _, n, k = stack.stored_shape
    block = stack.format.columns
    blocks, rest = divmod(experts * n * k, block)
    if rest and experts < stack.shape[0]:
        raise NotImplementedError(
            f"scattermoe: a quantized weight {list(stack.shape)} cannot be split after {experts} experts: blocks of "
            f"{block} elements run from one to the next; use fp8 instead"
        )
    return blocks + bool(rest)
