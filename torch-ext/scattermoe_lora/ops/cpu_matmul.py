"""Matrix products of an expert's rows on a CPU, through the library that computes them fastest.

bfloat16 is multiplied by oneDNN, which generates code for every shape it meets, half a megabyte and a third of a
millisecond each; and a router gives an expert another number of rows each time. So it is asked for few different
numbers of rows. float32 torch hands to MKL, which with the few dozen rows of an expert spends as much on packing the
weight as on the product, and on AMD leaves half of the vector width unused: oneDNN was faster
there. Where the processor has AMX it is Intel's, and MKL was ahead; on others than x86 torch chooses.

No public function reaches oneDNN with float32 without first copying the weight. The one called here is what
torch.compile emits on a CPU.
"""

from __future__ import annotations

import torch

# Multiplications from which oneDNN's set-up is worth its while in float32.
_LARGE = 1 << 20
_ROWS, _MOST_ROWS = 8, 256


def rounded(rows: int) -> int:
    """The number of rows that a product of ``rows`` is asked for: the next multiple of 8."""
    return -(-rows // _ROWS) * _ROWS


def has_onednn() -> bool:
    """Tell whether float32 can go to oneDNN: it was built in, the user wants it, and torch has the operator."""
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and bool(mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiplies_bfloat16() -> bool:
    """Tell whether oneDNN multiplies bfloat16 on this processor."""
    return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn_layout(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` ``[n, k]``, copied where neither it nor its transpose is contiguous.

    oneDNN has code for these two layouts, and for any other (a head's columns of ``[rows, heads * n]``) only a
    reference loop that takes a thousand times as long. The operator makes the other operand contiguous by itself.
    """
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def prefers_onednn() -> bool:
    """Tell whether oneDNN multiplies float32 faster than what torch calls by itself on this processor."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return is_x86 and has_onednn() and not torch.cpu._is_amx_tile_supported()


def add_matmul(x: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out += x @ right`` of ``[m, k]`` and ``[k, n]``, rounded once."""
    if x.shape[0] > _MOST_ROWS:
        # In pieces, so that few sizes occur.
        for rows, sums in zip(x.split(_MOST_ROWS), out.split(_MOST_ROWS), strict=True):
            add_matmul(rows, right, sums)
        return out
    if _is_large(x, right) and prefers_onednn():
        return out.add_(_linear(x, right.t()))
    return out.addmm_(x, right)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight^T`` of ``[m, k]`` and ``[n, k]``, for many rows of few different numbers."""
    return _linear(x, weight) if _is_large(x, weight) and prefers_onednn() else x @ weight.t()


def _is_large(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.shape[0] * weight.numel() >= _LARGE


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
        x, onednn_layout(weight), None, "none", [], ""
    )
    return result
