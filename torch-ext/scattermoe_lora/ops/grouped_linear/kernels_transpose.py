"""Triton kernel: the transpose of a matrix, scaled and in another dtype."""

import triton
import triton.language as tl


@triton.jit
def scaled_transpose_kernel(
    matrix_ptr, out_ptr, scaling, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Reads a block along the rows and writes it along the columns, multiplied in float32 and rounded once."""
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    block = tl.load(matrix_ptr + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
    scaled = (block.to(tl.float32) * scaling).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column[None, :] * rows + row[:, None], scaled, mask=mask)
