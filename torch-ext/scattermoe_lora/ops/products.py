"""Products of an expert's rows on a CPU, through the library that computes them fastest.

``torch.mm`` hands float32 to MKL, which with the few dozen rows of an expert spends as much on packing the weight as on
the product, and on some processors leaves half of the vector width unused. bfloat16 it hands to oneDNN, which generates
code for every shape it meets, half a megabyte and a third of a millisecond each; and a router gives an expert another
number of rows each time. Both are mended by asking oneDNN for pieces of few different sizes. The last piece may hold
more rows than there are: the surplus is whatever the caller's buffer holds behind ``x``, and its results are dropped.

No public function reaches oneDNN with float32 without first copying the weight. The one called here is what
torch.compile emits on a CPU.
"""

from __future__ import annotations

import torch

# Multiplications from which oneDNN's set-up is worth its while in float32.
_LARGE = 1 << 20
_ROWS, _MOST_ROWS = 32, 128


def rounded(rows: int) -> int:
    """The number of rows that a product of ``rows`` may read: the next multiple of 32."""
    return -(-rows // _ROWS) * _ROWS


def pieces(rows: int) -> list[tuple[int, int]]:
    """``(start, size)`` of what oneDNN is asked for: sizes of 256, and multiples of 32 up to 128."""
    found = []
    start = 0
    while rows - start > _MOST_ROWS:
        size = 2 * _MOST_ROWS if rows - start >= 2 * _MOST_ROWS else _MOST_ROWS
        found.append((start, size))
        start += size
    return [*found, (start, rounded(rows - start))] if start < rows else found


def _serves(dtype: torch.dtype, multiplications: int) -> bool:
    if dtype == torch.float32:
        return multiplications >= _LARGE and has_onednn()
    return dtype == torch.bfloat16 and multiplies_bfloat16()


def has_onednn() -> bool:
    """Whether float32 can go to oneDNN: it was built in, the user wants it, and torch has the operator."""
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and bool(mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor."""
    return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _widened(x: torch.Tensor, rows: int) -> torch.Tensor | None:
    """``x`` with the rows behind it in its buffer, ``rows`` in all; None where the buffer ends before."""
    if x.shape[0] == rows:
        return x
    end = (x.storage_offset() + rows * x.shape[1]) * x.element_size()
    if not x.is_contiguous() or x.untyped_storage().nbytes() < end:
        return None
    return x.as_strided((rows, x.shape[1]), x.stride())


def _onednn(x: torch.Tensor, weight: torch.Tensor, add: torch.Tensor | None) -> torch.Tensor:
    operator = torch.ops.mkldnn._linear_pointwise
    result: torch.Tensor = (
        operator(x, weight, None, "none", [], "")
        if add is None
        else operator.binary(x, add, weight, None, "add")
    )
    return result


def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``x W^T`` into ``out``: ``x`` ``[m, k]``, ``weight`` ``[n, k]``, contiguous or transposed, ``out`` ``[m, n]``."""
    rows = x.shape[0]
    wide = _widened(x, rounded(rows)) if _serves(x.dtype, rows * weight.numel()) else None
    if wide is None:
        return torch.mm(x, weight.t(), out=out)
    for start, size in pieces(rows):
        part = out[start : start + size]
        part.copy_(_onednn(wide[start : start + size], weight, None)[: part.shape[0]])
    return out


def add_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out += x W^T``, rounded once; shapes as for :func:`product`."""
    rows = x.shape[0]
    wide = _widened(x, rounded(rows)) if _serves(x.dtype, rows * weight.numel()) else None
    # float32 is added to in place; a sum in bfloat16 would be rounded twice that way.
    sums = out if wide is None or x.dtype == torch.float32 else _widened(out, rounded(rows))
    if wide is None or sums is None:
        return out.addmm_(x, weight.t())
    for start, size in pieces(rows):
        part = out[start : start + size]
        if x.dtype == torch.float32:
            part.add_(_onednn(wide[start : start + size], weight, None)[: part.shape[0]])
        else:
            result = _onednn(wide[start : start + size], weight, sums[start : start + size])
            part.copy_(result[: part.shape[0]])
    return out
