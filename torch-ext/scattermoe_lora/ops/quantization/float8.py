"""Float8 (E4M3) with a scale for each block, channel or tensor.

Source: ``transformers.integrations.finegrained_fp8`` 5.22 (``FP8Experts``, ``Fp8Dequantize``): a weight is ``code *
weight_scale_inv``, in float32 or as a power of two (UE8M0). A scale for ``[N, 1]`` or ``[1, 1]`` of a matrix is that of
a channel or of the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .formats import Format
from .stack import QuantizedStack


def read_float8(
    codes: torch.Tensor,
    scales: torch.Tensor,
    name: str,
    *,
    block_size: Sequence[int] | None = None,
    parts: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedStack:
    """The stack of float8 matrices.

    Args:
        codes: ``[E, N, K]``, float8_e4m3fn.
        scales: ``[E, R, C]``, float32, bfloat16, float16 or UE8M0 (float8_e8m0fnu, or its bytes as uint8); a missing
            E or a single number serves all experts.
        name: The parameter's, for messages.
        block_size: Rows and columns of a block, the last of which may be smaller; None for blocks that are all alike.
        parts: Matrices that were quantized one by one and stand under each other in ``codes`` (gate and up: 2). It
            decides where the blocks of rows are not all full.
        dtype: The dtype that the matrices stand for.

    Raises:
        ValueError: Scales that do not fit.
        NotImplementedError: Another float8 than E4M3, or scales whose blocks cannot be told from their number.
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise NotImplementedError(f"{name}: expected float8_e4m3fn, got {codes.dtype}")
    if codes.dim() != 3 or 0 in codes.shape:
        raise ValueError(f"{name}: expected [E, N, K], got {list(codes.shape)}")
    experts, n, k = codes.shape
    scales = as_scales(scales, experts)
    if scales.dim() != 3:
        raise ValueError(f"{name}_scale_inv: expected [E, R, C], got {list(scales.shape)}")
    rows = _block(n, scales.shape[1], block_size[0] if block_size else None, parts)
    columns = _block(k, scales.shape[2], block_size[1] if block_size else None, 1)
    if rows is None or columns is None:
        raise _mismatch(name, scales, codes.shape, block_size, parts)
    is_transposed = not codes.is_contiguous() and codes.mT.is_contiguous()
    if is_transposed:
        codes, scales, rows, columns = codes.mT, scales.mT, columns, rows
    codes = codes.detach().contiguous().view(torch.uint8)
    layout = Format("e4m3", rows, columns, transposed=is_transposed)
    return QuantizedStack(codes, (scales,), layout, dtype).check(name)


def as_scales(scales: torch.Tensor, experts: int) -> torch.Tensor:
    """``scales`` as ``[E, R, C]``, a view; bytes are UE8M0."""
    scales = scales.detach()
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    if scales.dim() < 2 and scales.numel() == 1:
        scales = scales.reshape(1, 1)
    if scales.dim() == 2:
        scales = scales.unsqueeze(0)
    return scales.expand(experts, -1, -1) if scales.dim() == 3 and scales.shape[0] == 1 else scales


def _block(size: int, count: int, block: int | None, parts: int) -> int | None:
    """The size of a block, of which ``count`` make up ``size``; None if that many cannot."""
    if block is None:
        return size // count if count and size % count == 0 else None
    if count * block == size:
        return block
    if parts > 1 and count == parts and size % parts == 0 and size // parts <= block:
        return size // parts
    # Where each part has scales of its own and more than one, a block may end with the part: they are not all alike.
    is_alike = parts == 1 or count == 1
    return block if is_alike and count == -(-size // block) else None


def _mismatch(
    name: str, scales: torch.Tensor, shape: torch.Size, block_size: Sequence[int] | None, parts: int
) -> Exception:
    n, k = shape[1:]
    got = f"{name}_scale_inv: expected "
    if block_size is None:
        return ValueError(f"{got}numbers of scales that divide {n} and {k}, got {list(scales.shape)}")
    grid = [scales.shape[0], -(-n // block_size[0]), -(-k // block_size[1])]
    if parts > 1 and n % block_size[0]:
        return NotImplementedError(
            f"{got}blocks of {block_size[0]} rows that do not cross from one of the {parts} matrices of {n // parts} "
            f"rows to the next, got scales {list(scales.shape)}"
        )
    return ValueError(
        f"{got}{grid} for blocks of {block_size[0]} x {block_size[1]}, got {list(scales.shape)}"
    )
