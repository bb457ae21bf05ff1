"""Rounding matrices to float8 with a power of two as the scale of each block of 128 x 128 elements.

Scales are powers of two because a floating-point grid is the same on every such scale: an element that no update
touched is still a number of the format when the largest element of its block has changed, and is written back as it
was. With ``largest / 448`` as the scale (what inference uses) every write would round every element of the block anew.

Stochastic rounding goes to one of the two neighbours with the probability that makes the mean the number itself, by
adding random bits below the last one that is kept. Source of both formats: *OCP 8-bit Floating Point Specification*
1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK = 128
"""Rows and columns of the block that shares a scale."""

_CHUNK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Float8:
    """An 8-bit floating-point format.

    Attributes:
        dtype: The torch dtype of these bits.
        mantissa: Bits of the mantissa that are stored.
        bias: What is added to an exponent.
        greatest: The greatest finite number.
    """

    dtype: torch.dtype
    mantissa: int
    bias: int
    greatest: float


E4M3 = Float8(torch.float8_e4m3fn, 3, 7, 448.0)
"""The format of weights: a relative step of 1/8 at most, 18 powers of two."""
E5M2 = Float8(torch.float8_e5m2, 2, 15, 57344.0)
"""The format of gradients: a relative step of 1/4 at most, 32 powers of two."""


def blocks_of(size: int) -> int:
    """The number of blocks along a dimension, the last of which may be smaller."""
    return -(-size // BLOCK)


def encode(
    matrix: torch.Tensor,
    kind: Float8,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    stochastic: bool,
    generator: torch.Generator | None = None,
) -> None:
    """Rounds a matrix to codes and scales. Beside them about 10 MB are allocated.

    A block with a number that is NaN or infinite decodes to NaN and infinities alone.

    Args:
        matrix: ``[N, K]``, floating point.
        kind: The format.
        codes: ``[N, K]`` uint8, where to.
        scales: ``[ceil(N / 128), ceil(K / 128)]`` float32, where to.
        stochastic: To a neighbour drawn at random; otherwise to the nearest, ties to even.
        generator: Of the random numbers; None for torch's.
    """
    n, k = matrix.shape
    rows = max(1, _CHUNK_ELEMENTS // (BLOCK * max(k, 1))) * BLOCK
    for start in range(0, n, rows):
        chunk = matrix[start : start + rows].float()
        height = chunk.shape[0]
        padded = F.pad(chunk, (0, -k % BLOCK, 0, -height % BLOCK))
        blocks = padded.view(blocks_of(height), BLOCK, blocks_of(k), BLOCK)
        scale = _scale(blocks.abs().amax((1, 3)), kind)
        scales[start // BLOCK : start // BLOCK + scale.shape[0]] = scale
        scaled = blocks / scale[:, None, :, None]
        codes[start : start + height] = _round(scaled, kind, stochastic, generator).view(padded.shape)[
            :height, :k
        ]


def _scale(largest: torch.Tensor, kind: Float8) -> torch.Tensor:
    """The least powers of two on which ``largest`` is in range; what is not finite stays as it is."""
    mantissa, exponent = torch.frexp(largest / kind.greatest)
    exponent = (exponent - (mantissa <= 0.5).to(exponent.dtype)).clamp(-126, 127)
    return torch.where(largest.isfinite(), torch.ldexp(torch.ones_like(largest), exponent), largest)


def _round(
    numbers: torch.Tensor, kind: Float8, stochastic: bool, generator: torch.Generator | None
) -> torch.Tensor:
    """uint8, the codes of float32 numbers in range, which are overwritten."""
    dropped = 23 - kind.mantissa
    least = 2.0 ** (1 - kind.bias)
    magnitude = numbers.abs()
    # Below the least normal number the step is constant, as it is from there to its double: rounded there, and moved
    # back by one exponent.
    is_small = magnitude < least
    bits = magnitude.add_(is_small, alpha=least).view(torch.int32)
    if stochastic:
        noise = torch.randint(
            1 << dropped, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
        )
    else:
        noise = (bits >> dropped).bitwise_and_(1).add_((1 << (dropped - 1)) - 1)
    codes = bits.add_(noise).bitwise_right_shift_(dropped)
    codes.sub_((127 - kind.bias) << kind.mantissa).add_(is_small, alpha=-(1 << kind.mantissa))
    signs = numbers.view(torch.int32).bitwise_right_shift_(24).bitwise_and_(0x80)
    return codes.bitwise_or_(signs).to(torch.uint8)


def decode(
    codes: torch.Tensor, scales: torch.Tensor, kind: Float8, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The matrix ``[N, K]`` of :func:`encode`'s results; two of its size in float32 are allocated at most."""
    n, k = codes.shape
    if kind is E5M2:  # The upper half of a float16.
        numbers = (codes.to(torch.int16) << 8).view(torch.float16).float()
    else:
        numbers = codes.view(kind.dtype).float()
    by_row = scales.repeat_interleave(BLOCK, 0)[:n]
    if k % BLOCK == 0:
        numbers.unflatten(1, (-1, BLOCK)).mul_(by_row.unsqueeze(-1))
    else:
        for block, part in enumerate(numbers.split(BLOCK, 1)):
            part.mul_(by_row[:, block : block + 1])
    return numbers.to(dtype)


def round_to_bfloat16(numbers: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """bfloat16 numbers whose mean over random numbers are the float32 ones; what is not finite stays so."""
    noise = torch.randint(
        1 << 16, numbers.shape, dtype=torch.int32, device=numbers.device, generator=generator
    )
    rounded = ((numbers.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(numbers.isfinite(), rounded, numbers).to(torch.bfloat16)
