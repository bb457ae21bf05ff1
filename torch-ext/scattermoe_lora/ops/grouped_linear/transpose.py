"""The transpose of a matrix, scaled and in another dtype: low-rank factors as PEFT keeps them, for the kernels.

torch takes four launches for it there and back, two of which read or write a few bytes at a time.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..launch import cdiv, next_power_of_2
from ..operator import register_autograd

# Elements of a block, and the most of its shorter side.
_BLOCK, _SIDE = 4096, 64
# What float32 holds exactly.
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def transpose_and_scale(matrix: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """``scaling * matrix^T``, contiguous.

    It is multiplied in the wider of both dtypes and then rounded to ``dtype``; so is the gradient, to that of
    ``matrix``.

    Args:
        matrix: ``[M, N]``, floating point.
        scaling: The factor.
        dtype: Of the result, ``[N, M]``.
    """
    # Where a graph is made the compiler chooses the kernels.
    if {matrix.dtype, dtype} <= _DTYPES and not torch.compiler.is_compiling() and dispatch.use_triton(matrix):
        dispatch.refuse_transforms("experts_forward", matrix)
        result: torch.Tensor = _differentiable(matrix.contiguous(), float(scaling), dtype)
        return result
    if scaling != 1:
        matrix = matrix.to(torch.promote_types(matrix.dtype, dtype)) * scaling
    return matrix.to(dtype).t().contiguous()


@torch.library.custom_op("scattermoe_lora::scaled_transpose", mutates_args=())
def scaled_transpose(matrix: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """:func:`transpose_and_scale` of a contiguous matrix by the Triton kernel."""
    from ..launcher import launch_kernel
    from .kernels_transpose import scaled_transpose_kernel

    rows, columns = matrix.shape
    out = matrix.new_empty((columns, rows), dtype=dtype)
    if out.numel():
        side = min(_SIDE, *(next_power_of_2(size) for size in (rows, columns)))
        blocks = (side, _BLOCK // side) if rows < columns else (_BLOCK // side, side)
        grid = (cdiv(rows, blocks[0]) * cdiv(columns, blocks[1]), 1, 1)
        with dispatch.undisturbed(matrix):
            launch_kernel(
                scaled_transpose_kernel,
                grid,
                (matrix, out, scaling, rows, columns),
                {"BLOCK_ROWS": blocks[0], "BLOCK_COLUMNS": blocks[1]},
            )
    return out


@scaled_transpose.register_fake
def _(matrix: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    return matrix.new_empty((matrix.shape[1], matrix.shape[0]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, float, torch.dtype], output: torch.Tensor) -> None:
    matrix, ctx.scaling, _ = inputs
    ctx.dtype = matrix.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return _differentiable(grad.contiguous(), ctx.scaling, ctx.dtype), None, None


_differentiable = register_autograd(scaled_transpose, _backward, _setup_context)
