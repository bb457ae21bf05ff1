"""Tensor descriptors of what the attention kernels read, whose boxes hardware (TMA) copies to shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..grouped_linear.descriptors import is_aligned


class Tile(NamedTuple):
    """So many rows and columns of one head of ``[B, S, H, D]`` or ``[S, H, D]``, as a program reads them at a time."""

    tensor: torch.Tensor
    rows: int
    columns: int


def box_of(rows: int, columns: int, packed: bool) -> list[int]:
    """A tile as a box of what :func:`describe` describes."""
    return [1] * (3 if packed else 2) + [rows, columns]


def describe(tile: Tile) -> TensorDescriptor | None:
    """A descriptor whose boxes are tiles: of ``[B, H, S, D]``, or a ragged one of packed sequences, ``[H, S, D]``.

    A ragged one (``triton.tools.ragged_tma``) gives zeros past the end of each sequence, not the next one's rows: what
    is infinite in those would be NaN when multiplied by a probability of 0.

    None where the hardware cannot copy boxes: a tensor without elements, a stride of 0 or one that is not a multiple of
    16 bytes, or such an address.
    """
    x = tile.tensor.transpose(-3, -2)
    # The stride of a dimension with one element is never taken; 8 elements are 16 bytes or more.
    strides = [stride if size > 1 else 8 for size, stride in zip(x.shape, x.stride(), strict=True)][:-1]
    if x.numel() == 0 or x.stride(-1) != 1 or not is_aligned(x, strides):
        return None
    x = x.as_strided(x.shape, [*strides, 1])
    if x.dim() == 3:
        return create_ragged_descriptor(x, [1, tile.rows, tile.columns], 1)
    return TensorDescriptor.from_tensor(x, box_of(tile.rows, tile.columns, False))


def sources(
    blocks: dict[str, int], tiles: Sequence[Tile], other: Sequence[Tile]
) -> tuple[list[Any], dict[str, int]]:
    """A kernel's first arguments, and its blocks and options, without ``TMA`` where it cannot be had.

    Args:
        blocks: The blocks and options that its table has.
        tiles: What it reads in tiles of ``CHUNK`` columns, or all of whose tiles have the same: each a pointer, or a
            descriptor with ``TMA``.
        other: The same tensors in tiles of other columns, each a descriptor, or None: with pointers, whose tiles may
            have any, and where the columns are no other.
    """
    if blocks.get("TMA"):
        described = [describe(tile) for tile in tiles]
        if None not in described:
            described += [None if tile.columns == blocks["CHUNK"] else describe(tile) for tile in other]
            return described, blocks
    return [*(tile.tensor for tile in tiles), *(None for _ in other)], {**blocks, "TMA": 0}
