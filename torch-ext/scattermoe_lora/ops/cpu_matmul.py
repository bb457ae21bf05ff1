"""Matrix products of an expert's rows on a CPU, through the library that computes them fastest.

``torch.mm`` hands float32 to MKL, which with the few dozen rows of an expert spends as much on packing the weight as on
the product, and on some processors leaves half of the vector width unused. bfloat16 it hands to oneDNN, which generates
code for every shape it meets, half a megabyte and a third of a millisecond each; and a router gives an expert another
number of rows each time. Both are mended by asking oneDNN for pieces of few different sizes. The last piece may hold
more rows than there are: the surplus is whatever the caller's buffer holds behind ``x``, and its results are dropped.

No public function reaches oneDNN with float32 without first copying the weight. The one called here is what
torch.compile emits on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

# Multiplications from which oneDNN's set-up is worth its while in float32.
_LARGE = 1 << 20
_ROWS, _MOST_ROWS = 16, 128


def rounded(rows: int) -> int:
    """The number of rows that a product of ``rows`` may read: the next multiple of 16."""
    return -(-rows // _ROWS) * _ROWS


def pieces(rows: int) -> list[int]:
    """The sizes that oneDNN is asked for: 256, and multiples of 16 up to 128; the last may reach beyond ``rows``."""
    whole, rest = divmod(rows, 2 * _MOST_ROWS)
    sizes = [2 * _MOST_ROWS] * whole
    if rest > _MOST_ROWS:
        sizes.append(_MOST_ROWS)
        rest -= _MOST_ROWS
    return [*sizes, rounded(rest)] if rest else sizes


def _serves(dtype: torch.dtype, multiplications: int) -> bool:
    if dtype == torch.float32:
        return multiplications >= _LARGE and has_onednn()
    return dtype == torch.bfloat16 and multiplies_bfloat16()


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


def _widened(x: torch.Tensor, rows: int) -> torch.Tensor | None:
    """``x`` with the rows behind it in its buffer, ``rows`` in all; None where the buffer ends before."""
    if x.shape[0] == rows:
        return x
    end = (x.storage_offset() + rows * x.shape[1]) * x.element_size()
    if not x.is_contiguous() or x.untyped_storage().nbytes() < end:
        return None
    return x.as_strided((rows, x.shape[1]), x.stride())


def _cut(x: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
    """``x`` in pieces; the last ends with ``x``."""
    if len(sizes) == 1:
        return (x,)
    return x.split([*sizes[:-1], x.shape[0] - sum(sizes[:-1])])


def _onednn(
    x: torch.Tensor, right: torch.Tensor, rows: int, sizes: list[int], add: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """``x @ right`` (plus ``add``), a piece at a time and without the surplus behind ``rows``."""
    operator, weight = torch.ops.mkldnn._linear_pointwise, onednn_layout(right.t())
    for i, piece in enumerate(_cut(x, sizes)):
        if add is None:
            result = operator(piece, weight, None, "none", [], "")
        else:
            result = operator.binary(piece, _cut(add, sizes)[i], weight, None, "add")
        yield result if i < len(sizes) - 1 or sum(sizes) == rows else result[: rows - sum(sizes)]


def matmul(x: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``x @ right`` into ``out``: ``[m, k]`` and ``[k, n]``; fastest where ``right`` or its transpose is contiguous."""
    rows = x.shape[0]
    wide = _widened(x, rounded(rows)) if _serves(x.dtype, rows * right.numel()) else None
    if wide is None:
        return torch.mm(x, right, out=out)
    sizes = pieces(rows)
    for part, result in zip(_cut(out, sizes), _onednn(wide, right, rows, sizes), strict=True):
        part.copy_(result)
    return out


def add_matmul(x: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out += x @ right``, rounded once; shapes as for :func:`matmul`."""
    rows = x.shape[0]
    wide = _widened(x, rounded(rows)) if _serves(x.dtype, rows * right.numel()) else None
    # float32 is added to in place; a sum in bfloat16 would be rounded twice that way.
    in_place = x.dtype == torch.float32
    sums = None if wide is None or in_place else _widened(out, rounded(rows))
    if wide is None or (sums is None and not in_place):
        return out.addmm_(x, right)
    sizes = pieces(rows)
    for part, result in zip(_cut(out, sizes), _onednn(wide, right, rows, sizes, sums), strict=True):
        part.add_(result) if in_place else part.copy_(result)
    return out


def low_rank_matmul(
    x: torch.Tensor, right: torch.Tensor, low: torch.Tensor, low_right: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """``x @ right + low @ low_right`` into ``out``, the second of them the smaller one.

    The small terms come first, so that the sum is rounded once, after the large ones. float32 has digits to spare, and
    adding to oneDNN's result while it is copied saves a pass.
    """
    rows = x.shape[0]
    wide = None
    if x.dtype == torch.float32 and _serves(x.dtype, rows * right.numel()):
        wide = _widened(x, rounded(rows))
    if wide is None:
        return add_matmul(x, right, matmul(low, low_right, out))
    sizes = pieces(rows)
    parts = zip(_cut(out, sizes), _cut(low, sizes), _onednn(wide, right, rows, sizes), strict=True)
    for part, low_part, result in parts:
        torch.addmm(result, low_part, low_right, out=part)
    return out
