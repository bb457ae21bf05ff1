"""Comparisons and codes that the tests of quantized stacks share."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """True if both have the same bits, but for those of NaN."""
    numbers = ~expected.isnan()
    integer = torch.int32 if got.dtype == torch.float32 else torch.int16
    return (
        got.dtype == expected.dtype
        and got.shape == expected.shape
        and torch.equal(got.isnan(), ~numbers)
        and torch.equal(got[numbers].view(integer), expected[numbers].view(integer))
    )


def every_code(experts: int, n: int, k: int) -> torch.Tensor:
    """Random bytes ``[experts, n, k]``, each of the 256 among the first."""
    codes = torch.randint(256, (experts, n, k), dtype=torch.uint8)
    codes.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)[: codes.numel()]
    return codes
