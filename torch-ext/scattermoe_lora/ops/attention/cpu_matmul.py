"""Products of stacks of matrices on a CPU, through the library that computes them fastest.

``torch.bmm`` hands float32 to MKL, which on some processors leaves half of the vector width unused; oneDNN does not,
and is reached as torch.compile's code reaches it. bfloat16 goes to oneDNN by itself, which sums in float32 but rounds
what it returns: two products give it back in full, and where a processor multiplies bfloat16 they are still fastest.
"""

from __future__ import annotations

import math

import torch

from ..cpu_matmul import has_onednn, multiplies_bfloat16, onednn_layout

# Multiplications from which oneDNN's set-up is worth its while in float32.
_LARGE = 1 << 20
REGULAR = 64
"""Lengths that are multiples of it are multiplied fastest."""


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of ``dtype`` are multiplied in."""
    if dtype == torch.bfloat16 and not multiplies_bfloat16():
        return torch.float32
    return torch.float32 if dtype == torch.float16 else dtype


def matmul_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b^T`` of each pair of matrices, in their dtype.

    Args:
        a: ``[H, m, k]``.
        b: ``[H, n, k]``; fastest where each matrix or its transpose is contiguous.
    """
    sizes = (a.shape[1], b.shape[1], b.shape[2])
    # oneDNN generates code for every shape it meets, half a megabyte each: lengths that recur are worth it.
    is_regular = math.prod(sizes) >= _LARGE and not any(size % REGULAR for size in sizes)
    if a.dtype == torch.float32 and is_regular and has_onednn():
        by_head = [
            torch.ops.mkldnn._linear_pointwise(x, onednn_layout(y), None, "none", [], "")
            for x, y in zip(a.unbind(), b.unbind(), strict=True)
        ]
        return torch.stack(by_head) if len(by_head) > 1 else by_head[0].unsqueeze(0)
    return torch.bmm(a, b.mT)


def exact_matmul_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same in float32 (float64 for float64): of bfloat16 the product, and what rounding took from it."""
    rounded = matmul_transposed(a, b)
    if a.dtype != torch.bfloat16:
        return rounded
    return rounded.float().sub_(torch.baddbmm(rounded, a, b.mT, alpha=-1))
