"""The product with a quantized weight where few rows meet an expert: no decoded matrix is written anywhere.

A program decodes the tiles of the weight that it multiplies. Where an expert has no more rows than a tile, each code is
read and decoded once, and only the codes of experts that have rows are; with more rows it would be once for each tile
of them, and decoding into a workspace is ahead.
"""

from __future__ import annotations

from typing import TypeGuard

import torch

from ..launch import cdiv, next_power_of_2
from ..launcher import launch_kernel
from ..quantization import gpu as decoding
from ..quantization.stack import QuantizedStack, Weight
from ..routing import Routing
from .kernels_few_rows import quantized_matmul_kernel
from .schedule import most_tiles
from .workspace import LowRank

# The fewest rows that tensor cores multiply, and 32 elements of the weight a thread: few enough that the codes of the
# next step and 16 warps fit in the registers of a multiprocessor. In stages, Triton would copy scales one by one.
# Reasoned and compiled, not timed.
BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
# Bytes of a row that are multiplied at a time.
STEP_BYTES = 128
# Rows an expert, on average, up to which this product is taken: those of one tile.
FEW = BLOCKS["BLOCK_M"]


def blocks_for(itemsize: int, rank: int) -> dict[str, int]:
    """What to launch with for elements of that many bytes and factors of that rank, 0 for none."""
    step = STEP_BYTES // itemsize
    # 16 is the least that ``tl.dot`` multiplies.
    return {**BLOCKS, "BLOCK_K": step, "BLOCK_R": min(step, max(16, next_power_of_2(rank)))}


def has_few_rows(weight: Weight, routing: Routing) -> TypeGuard[QuantizedStack]:
    """True if the weight is quantized and its product reads it as it is stored."""
    return isinstance(weight, QuantizedStack) and routing.order.shape[0] <= FEW * weight.shape[0]


def matmul(
    x: torch.Tensor,
    weight: QuantizedStack,
    routing: Routing,
    out: torch.Tensor,
    *,
    top_k: int | None,
    low: LowRank | None,
    bias: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    scatter: bool,
    precision: str,
) -> None:
    """:func:`scattermoe_lora.ops.grouped_linear.gpu.grouped_matmul` into ``out``, in that precision for float32."""
    num_experts, n_out, n_in = weight.shape
    pairs = routing.order.shape[0]
    # Pointers that are not used still have to be pointers.
    left, right = low or (x, x)
    rank = left.shape[1] if low else 0
    stack, blocks = decoding.kernel_operands(weight), blocks_for(x.element_size(), rank)
    tiles = most_tiles(pairs, num_experts, blocks["BLOCK_M"]) * cdiv(n_out, blocks["BLOCK_N"])
    launch_kernel(
        quantized_matmul_kernel,
        (tiles, 1, 1),
        (
            x,
            *stack.pointers,
            left,
            right,
            x if bias is None else bias,
            x if row_weight is None else row_weight,
            out,
            *routing,
            pairs,
            num_experts,
            n_out,
            n_in,
            rank,
            x.stride(0),
            *stack.strides,
            *(right.stride() if low else (0, 0, 0)),
        ),
        {
            **stack.constants,
            "TRANSPOSED": weight.format.transposed,
            "GATHER": top_k is not None,
            "TOP_K": top_k or 1,
            "SCATTER": scatter,
            "LOW_RANK": low is not None,
            "BIAS": bias is not None,
            "WEIGHTED": row_weight is not None,
            "EXPERTS_POW2": next_power_of_2(num_experts + 1),
            "PRECISION": precision,
            **blocks,
            **decoding.OPTIONS,
        },
    )
