"""Products of an expert's rows on a CPU, through the library that computes them fastest.

``torch.mm`` hands float32 to MKL, which with the few dozen rows of an expert spends as much on packing the weight as on
the product, and on some processors leaves half of the vector width unused. bfloat16 it hands to oneDNN, which generates
code for every shape it meets, half a megabyte and a third of a millisecond each; and a router gives an expert another
number of rows each time. Both are mended by asking oneDNN for a few more rows than there are: numbers of rows repeat,
and the result's surplus is dropped. The surplus rows are whatever the caller's buffer holds behind ``x``.

No public function reaches oneDNN with float32 without first copying the weight. The one called here is what
torch.compile emits on a CPU.
"""

from __future__ import annotations

import torch

# Multiplications from which oneDNN's set-up is worth its while in float32.
_LARGE = 1 << 20
_ROWS = 16


def rounded(rows: int) -> int:
    """The number of rows that oneDNN is asked for: the next multiple of 16, from 128 on the next of eight an octave."""
    step = max(_ROWS, (1 << max(rows - 1, 0).bit_length()) // 16)
    return -(-rows // step) * step


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


def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``x W^T`` into ``out``: ``x`` ``[m, k]``, ``weight`` ``[n, k]``, contiguous or transposed, ``out`` ``[m, n]``."""
    rows = x.shape[0]
    if _serves(x.dtype, rows * weight.numel()):
        wide = _widened(x, rounded(rows))
        if wide is not None:
            result = torch.ops.mkldnn._linear_pointwise(wide, weight, None, "none", [], "")
            return out.copy_(result[:rows])
    return torch.mm(x, weight.t(), out=out)


def add_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out += x W^T``, rounded once; shapes as for :func:`product`."""
    rows = x.shape[0]
    if _serves(x.dtype, rows * weight.numel()):
        wide, sums = _widened(x, rounded(rows)), _widened(out, rounded(rows))
        if wide is not None and x.dtype == torch.float32:
            return out.add_(torch.ops.mkldnn._linear_pointwise(wide, weight, None, "none", [], "")[:rows])
        if wide is not None and sums is not None:
            result = torch.ops.mkldnn._linear_pointwise.binary(wide, sums, weight, None, "add")
            return out.copy_(result[:rows])
    return out.addmm_(x, weight.t())
