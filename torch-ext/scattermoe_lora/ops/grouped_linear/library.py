"""The base product by torch's own grouped matrix product, to which the grouped GEMM's kernels then add the rest.

It multiplies rows that stand in order, with CUTLASS on compute capabilities 9.x and 10.x, and so needs a gathered copy
of them. Elsewhere torch waits for the device and multiplies expert by expert.
"""

from __future__ import annotations

import torch
from torch.nn.functional import grouped_mm

from ..routing import Routing

# What torch asks of an address and of the distance of two rows, and the experts that its kernel counts.
_BYTES = 16
_MOST_EXPERTS = 1023


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """True if torch multiplies these rows and weights in one launch.

    On a GPU those are bfloat16 alone. A row of ``x`` and of ``weight`` begins at a multiple of 16 bytes, and each
    matrix, or its transpose, is row by row in memory.
    """
    if x.dtype != torch.bfloat16 and x.device.type != "cpu":
        return False
    experts, *sides = weight.shape
    (row, column), (n_out, n_in) = weight.stride()[1:], sides
    is_by_rows = (column == 1 and row >= n_in) or (row == 1 and column >= n_out)
    distances = (x.stride(0), weight.stride(0), max(row, column))
    return (
        experts <= _MOST_EXPERTS
        and is_by_rows
        and all(distance * x.itemsize % _BYTES == 0 for distance in distances)
        and all(tensor.data_ptr() % _BYTES == 0 for tensor in (x, weight))
    )


def product(x: torch.Tensor, weight: torch.Tensor, routing: Routing, top_k: int | None) -> torch.Tensor:
    """``x[row] W[e]^T`` for every pair in sorted order, ``[S, N_out]``, rounded to the dtype of ``x``.

    Rows of pairs without an expert here are not written. Arguments as for
    :func:`scattermoe_lora.ops.grouped_linear.gpu.grouped_matmul`.
    """
    rows = x if top_k is None else x.index_select(0, routing.order // top_k)
    return grouped_mm(rows, weight.mT, offs=routing.offsets[1:].to(torch.int32))
