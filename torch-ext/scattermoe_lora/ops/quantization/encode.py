"""Quantizing a dense stack of matrices, a few megabytes at a time.

Sources: ``bitsandbytes.functional.quantize_4bit`` 0.50 for NF4 and FP4, whose bits these are: 64 consecutive elements
of the flattened stack share the largest of their absolute values, by whose reciprocal each is multiplied, and it
becomes the nearest of 16 numbers. Float8 is E4M3 with one float32 for a block of 128 x 128 elements of a matrix, as
DeepSeek-V3's checkpoints and transformers' fine-grained FP8 have it: a floating code keeps its relative precision over
a wide block, and one such scale for 16384 elements is nothing beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .formats import Format, element_values
from .stack import FLOATS, QuantizedStack

FLAT_BLOCK = 64
"""Elements that share a scale in NF4 and FP4: bitsandbytes' default."""
GRID_BLOCK = 128
"""Rows and columns of the block that shares a scale in float8."""

_CHUNK_ELEMENTS = 1 << 20
_GREATEST = 448.0  # in E4M3


def quantize(weight: torch.Tensor, format: str, name: str = "weight") -> QuantizedStack:
    """The stack that stands for a dense one. Beside it a few megabytes are allocated.

    Args:
        weight: ``[E, N, K]`` of float32, bfloat16 or float16, which is left as it is.
        format: ``"nf4"``, ``"fp4"`` or ``"fp8"``.
        name: The parameter's, for messages.

    Raises:
        ValueError: Another format, shape or dtype, an odd K in 4 bits, or numbers that are NaN or infinite.
    """
    if format not in _ENCODERS:
        raise ValueError(f"{name}: expected a format among {', '.join(FORMATS)}, got {format!r}")
    if weight.dim() != 3 or 0 in weight.shape:
        raise ValueError(f"{name}: expected [E, N, K], got {list(weight.shape)}")
    if weight.dtype not in FLOATS:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, FLOATS))}, got {weight.dtype}")
    if not weight.is_contiguous():
        if weight.mT.is_contiguous():
            return quantize(weight.mT, format, name).mT
        weight = weight.contiguous()
    if format != "fp8" and weight.shape[-1] % 2:
        raise ValueError(f"{name}: expected an even number of columns for {format}, got {weight.shape[-1]}")
    stack = _ENCODERS[format](weight.detach())
    if not weight.is_meta and not bool(stack.scales[0].isfinite().all()):
        raise ValueError(f"{name}: expected finite weights, got some that are NaN or infinite")
    return stack


def _encode_flat(element: str, weight: torch.Tensor) -> QuantizedStack:
    experts, n, k = weight.shape
    elements = weight.view(-1)
    codes = weight.new_empty(elements.numel() // 2, dtype=torch.uint8)
    scales = weight.new_empty(-(-elements.numel() // FLAT_BLOCK), dtype=torch.float32)
    bounds, order = _thresholds(element, weight.device)
    # On the meta device there is nothing to write, and shapes are known.
    for start in range(0, 0 if weight.is_meta else elements.numel(), _CHUNK_ELEMENTS):
        chunk = elements[start : start + _CHUNK_ELEMENTS].float()
        end, first = start + chunk.numel(), start // FLAT_BLOCK
        whole = chunk[: chunk.numel() // FLAT_BLOCK * FLAT_BLOCK].view(-1, FLAT_BLOCK)
        absmax = torch.amax(whole.abs(), -1)
        parts = [(whole * absmax.clamp(min=1e-38).reciprocal().unsqueeze(-1)).view(-1)]
        scales[first : first + absmax.numel()] = absmax
        if whole.numel() < chunk.numel():
            rest = chunk[whole.numel() :]
            # The last block, which alone may be smaller, is divided by its scale, and this is not let be zero.
            scales[-1] = rest.abs().amax().clamp(min=1e-38)
            parts.append(rest / scales[-1])
        index = torch.bucketize(torch.cat(parts).clamp_(-1, 1), bounds, out_int32=True)
        code = order[index]
        codes[start // 2 : end // 2] = (code[::2] << 4) | code[1::2]
    return QuantizedStack(codes.view(experts, n, k // 2), (scales,), layout_of(element), weight.dtype)


@functools.cache
def _thresholds(element: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The 15 numbers half way between neighbouring values, and the code of each value in ascending order."""
    values, order = element_values(element, torch.device("cpu")).sort(stable=True)
    return ((values[:-1] + values[1:]) / 2).to(device), order.to(torch.uint8).to(device)


def _encode_float8(weight: torch.Tensor) -> QuantizedStack:
    experts, n, k = weight.shape
    row_blocks, column_blocks = -(-n // GRID_BLOCK), -(-k // GRID_BLOCK)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    scales = weight.new_empty((experts, row_blocks, column_blocks), dtype=torch.float32)
    padding = (0, -k % GRID_BLOCK)
    for expert in range(0 if weight.is_meta else experts):
        for block in range(row_blocks):
            rows = slice(block * GRID_BLOCK, (block + 1) * GRID_BLOCK)
            chunk = torch.nn.functional.pad(weight[expert, rows].float(), padding)
            blocks = chunk.unflatten(-1, (column_blocks, GRID_BLOCK))
            scale = blocks.abs().amax((0, 2)).div_(_GREATEST)
            scales[expert, block] = scale
            # Of zeros, or of numbers that float32 has no 448th part of, the codes are zero.
            scaled = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).clamp_(
                -_GREATEST, _GREATEST
            )
            codes[expert, rows] = scaled.flatten(1)[:, :k].to(torch.float8_e4m3fn).view(torch.uint8)
    return QuantizedStack(codes, (scales,), layout_of("fp8"), weight.dtype)


_ENCODERS: dict[str, Callable[[torch.Tensor], QuantizedStack]] = {
    "nf4": functools.partial(_encode_flat, "nf4"),
    "fp4": functools.partial(_encode_flat, "fp4"),
    "fp8": _encode_float8,
}
FORMATS = tuple(_ENCODERS)
"""The formats that :func:`quantize` has."""


def layout_of(format: str) -> Format:
    """The elements and blocks of a stack that :func:`quantize` makes in one of :data:`FORMATS`."""
    if format == "fp8":
        return Format("e4m3", GRID_BLOCK, GRID_BLOCK)
    return Format(format, 0, FLAT_BLOCK)
