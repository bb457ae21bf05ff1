"""The base weights' products on a CPU, through the library that computes them fastest."""

from __future__ import annotations

import torch

# Multiplications from which oneDNN's set-up is worth its while.
_LARGE = 1 << 20
_ROWS = 16


def rounded(rows: int) -> int:
    """The least number of rows ``>= rows`` for which oneDNN is asked: one of eight an octave."""
    step = max(_ROWS, (1 << max(rows - 1, 0).bit_length()) // 16)
    return -(-rows // step) * step


def _onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """``x W^T`` by oneDNN, or None where ``torch.mm`` serves as well.

    ``torch.mm`` takes oneDNN for bfloat16 and float16 by itself, but MKL for float32. With the few dozen rows of an
    expert MKL spends as much on packing the weight as on the product, and on some processors it leaves half of the
    vector width unused. No public function reaches oneDNN without first copying the weight; the one here is what
    torch.compile emits on a CPU.

    oneDNN generates code for every shape, half a megabyte each, and a router gives an expert another number of rows
    each time. So a few more rows are read than are asked for, whatever they hold: the caller's buffer has them.
    """
    rows, width = x.shape
    if x.dtype != torch.float32 or rows * weight.numel() < _LARGE:
        return None
    if not (torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return None
    wanted = rounded(rows)
    if wanted != rows:
        if not x.is_contiguous() or (
            x.untyped_storage().nbytes() < (x.storage_offset() + wanted * width) * x.element_size()
        ):
            return None
        x = x.as_strided((wanted, width), x.stride())
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result if wanted == rows else result[:rows]


def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``x W^T`` into ``out``: ``x`` ``[m, k]``, ``weight`` ``[n, k]``, contiguous or transposed, ``out`` ``[m, n]``."""
    fast = _onednn(x, weight)
    return torch.mm(x, weight.t(), out=out) if fast is None else out.copy_(fast)


def add_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out += x W^T``, shapes as for :func:`product`."""
    fast = _onednn(x, weight)
    return out.addmm_(x, weight.t()) if fast is None else out.add_(fast)
