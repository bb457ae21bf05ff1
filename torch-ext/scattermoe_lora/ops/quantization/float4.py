"""E2M1, two codes a byte, with a scale for 16 or 32 elements of a row: MXFP4, NVFP4, transformers' FP4 experts.

Sources: the *OCP Microscaling Formats* specification 1.0 (MXFP4: a power of two for 32 elements, the lower half of a
byte first), as ``transformers.integrations.mxfp4`` 5.22 reads gpt-oss (``{name}_blocks``, ``{name}_scales``) and
``transformers.integrations.finegrained_fp8`` keeps ``expert_dtype="fp4"``; and ``torchao.prototype.mx_formats`` 0.18
for NVFP4, where a float8 (E4M3) for 16 elements is multiplied by one float32.
"""

from __future__ import annotations

import torch

from .float8 import as_scales
from .formats import Format
from .stack import QuantizedStack


def read_mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, name: str, dtype: torch.dtype = torch.bfloat16
) -> QuantizedStack:
    """The stack of gpt-oss's matrices, with ``[E, N, K]`` as stored: the transposes of the module's ``[E, K, N]``.

    Args:
        blocks: ``[E, N, K // 32, 16]``, uint8.
        scales: ``[E, N, K // 32]``, UE8M0 as uint8.
        name: The parameter's, for messages.
        dtype: The dtype that the matrices stand for.

    Raises:
        ValueError: Shapes or dtypes that are not these.
    """
    if blocks.dim() != 4 or blocks.shape[-1] != 16 or blocks.dtype != torch.uint8:
        raise ValueError(
            f"{name}_blocks: expected [E, N, K // 32, 16] of torch.uint8, got {list(blocks.shape)} of {blocks.dtype}"
        )
    if scales.shape != blocks.shape[:-1] or scales.dtype != torch.uint8:
        raise ValueError(
            f"{name}_scales: expected {list(blocks.shape[:-1])} of torch.uint8, got {list(scales.shape)} of "
            f"{scales.dtype}"
        )
    return read_float4(blocks.flatten(2), scales, name, dtype=dtype)


def read_float4(
    codes: torch.Tensor,
    scales: torch.Tensor,
    name: str,
    *,
    factor: torch.Tensor | None = None,
    block: int = 32,
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedStack:
    """The stack of matrices in E2M1.

    Args:
        codes: ``[E, N, K // 2]`` of one byte each, the lower half first.
        scales: ``[E, N, K // block]``: UE8M0 (float8_e8m0fnu, or its bytes as uint8), float8_e4m3fn or a wider float.
        name: The parameter's, for messages.
        factor: float32 that multiplies the scales, one for the stack or for each expert; or None.
        block: Consecutive elements of a row that share a scale.
        dtype: The dtype that the matrices stand for.

    Raises:
        ValueError: Scales that do not fit.
    """
    if codes.dim() != 3 or 0 in codes.shape or codes.element_size() != 1:
        raise ValueError(
            f"{name}: expected [E, N, K // 2] of one byte each, got {list(codes.shape)} of {codes.dtype}"
        )
    is_transposed = not codes.is_contiguous() and codes.mT.is_contiguous()
    if is_transposed:
        codes, scales = codes.mT, scales.mT
    experts, _, half = codes.shape
    if half * 2 % block:
        raise ValueError(f"{name}: expected rows of a multiple of {block} elements, got {half * 2}")
    parts = [as_scales(scales, experts)]
    if factor is not None:
        if factor.numel() not in (1, experts):
            raise ValueError(
                f"{name}: expected a scale for the stack or for {experts} experts, got {list(factor.shape)}"
            )
        parts.append(factor.detach().reshape(-1).expand(experts))
    layout = Format("e2m1", 1, block, transposed=is_transposed)
    codes = codes.detach().contiguous().view(torch.uint8)
    return QuantizedStack(codes, tuple(parts), layout, dtype).check(name)
