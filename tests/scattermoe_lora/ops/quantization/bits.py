"""Comparisons, codes, stacks and watched allocations that the tests of quantized stacks share."""

from __future__ import annotations

from typing import Any

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


# Element, rows, columns and nested blocks of each format, and the dtype of its scales.
FORMATS: dict[str, tuple[str, int, int, int, torch.dtype]] = {
    "nf4": ("nf4", 0, 64, 0, torch.float32),
    "nested nf4": ("nf4", 0, 32, 4, torch.uint8),
    "fp4": ("fp4", 0, 64, 0, torch.float32),
    "float8 blocks": ("e4m3", 16, 32, 0, torch.float32),
    "float8 channels": ("e4m3", 1, 1 << 20, 0, torch.bfloat16),
    "float8 tensor": ("e4m3", 1 << 20, 1 << 20, 0, torch.float32),
    "mxfp4": ("e2m1", 1, 32, 0, torch.float8_e8m0fnu),
    "nvfp4": ("e2m1", 1, 16, 0, torch.float8_e4m3fn),
}


def make_stack(quantization: Any, kind: str, experts: int, n: int, k: int, transposed: bool = False) -> Any:
    """A random stack that stands for float32 ``[experts, n, k]``, stored transposed or as it is meant."""
    if transposed:
        return make_stack(quantization, kind, experts, k, n).mT
    element, rows, columns, nested, dtype = FORMATS[kind]
    layout = quantization("formats").Format(element, rows, columns, nested)
    if element == "e4m3":
        codes = torch.randn(experts, n, k).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = torch.randint(256, (experts, n, k // 2), dtype=torch.uint8)
    scales: tuple[torch.Tensor, ...]
    if rows:
        grid = (experts, -(-n // rows), -(-k // columns))
        scales = ((torch.rand(grid) + 0.5).mul_(k**-0.5).to(dtype),)
        if kind == "nvfp4":
            scales = (*scales, torch.rand(experts) + 0.5)
    else:
        blocks = -(-experts * n * k // columns)
        scales = ((torch.rand(blocks) + 0.5).mul_(k**-0.5),)
        if nested:
            index = torch.randint(256, (blocks,), dtype=torch.uint8)
            scales = (index, torch.randn(256), torch.rand(-(-blocks // nested)) / 10, torch.tensor(0.2))
    return quantization("stack").QuantizedStack(codes, scales, layout, torch.float32).check(kind)
