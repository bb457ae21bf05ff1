"""Tensor descriptors of weights and of rows in order, whose boxes hardware (TMA) copies to shared memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

# What the hardware asks of an address and of the distance of two rows.
_BYTES = 16


def box_of(along: str, parts: int, block_n: int, block_k: int) -> list[int]:
    """The box that a program loads at a time.

    Args:
        along: ``K`` or ``N``, the dimension in which the weight is contiguous.
        parts: The tile's columns are so many runs, equally far apart: two of a gate and an up projection that stand
            one behind the other. 1 where the weight is contiguous along N.
        block_n, block_k: The tile's columns, and how many of the sum's terms it takes at a time.
    """
    return [1, parts, block_n // parts, block_k] if along == "K" else [1, block_k, block_n]


def describe(
    weight: torch.Tensor, parts: int, block_n: int, block_k: int
) -> tuple[TensorDescriptor | torch.Tensor, str]:
    """A descriptor of ``weight`` ``[E, N, K]`` and the dimension along which it is contiguous, ``K`` or ``N``.

    Where the hardware cannot copy boxes of this weight, the weight itself and an empty string: a row that is not a
    multiple of 16 bytes, an address that is not, or a box whose two runs of columns would not lie one behind the other
    in shared memory.
    """
    experts, columns, terms = weight.shape
    expert, column, term = weight.stride()
    if term == 1:
        along, shape = "K", [experts, parts, columns // parts, terms]
        strides = [expert, columns // parts * column, column, term]
    elif column == 1 and parts == 1:
        along, shape = "N", [experts, terms, columns]
        strides = [expert, term, column]
    else:
        return weight, ""
    if not is_aligned(weight, strides[:-1]):
        return weight, ""
    return TensorDescriptor(weight, shape, strides, box_of(along, parts, block_n, block_k)), along


def describe_rows(x: torch.Tensor, block_m: int, block_k: int) -> TensorDescriptor | None:
    """A descriptor of rows ``[S, K]``, or None where the hardware cannot copy boxes of them."""
    if x.stride(1) != 1 or not is_aligned(x, [x.stride(0)]):
        return None
    return TensorDescriptor.from_tensor(x, [block_m, block_k])


def is_aligned(tensor: torch.Tensor, strides: Sequence[int]) -> bool:
    """True if the address and these strides are what the hardware asks for."""
    starts_aligned = tensor.data_ptr() % _BYTES == 0
    return starts_aligned and all(stride and stride * tensor.itemsize % _BYTES == 0 for stride in strides)
