"""The number formats of quantized weights: element types, and which elements share a scale.

Every format here stores a code of 4 or 8 bits for an element, and the element is ``value(code) * scale``, a product of
two float32 rounded once to the dtype that is asked for. They differ in the values, in the blocks that share a scale,
and in how the scale itself is stored.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Element:
    """An element type.

    Attributes:
        bits: 4 (two codes a byte) or 8.
        high_first: The first of two codes in a byte stands in its upper half.
        values: The value of each 4-bit code; empty for 8 bits, which ``dtype`` describes.
        dtype: The torch dtype whose bits the codes are, or None.
    """

    bits: int
    high_first: bool = False
    values: tuple[float, ...] = ()
    dtype: torch.dtype | None = None


# Sources: the quantiles of a normal distribution in Dettmers et al., *QLoRA* (2023), appendix E, as float32; the
# twelfths to which bitsandbytes normalizes its own 4-bit float (0, 1/16, 8, 12, 4, 6, 2, 3 in order of the bits); E2M1
# of the *OCP Microscaling Formats* specification 1.0 and E4M3 of *OCP 8-bit Floating Point*.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# bitsandbytes writes the second zero as the integer 0, so it has no sign.
_FP4 = (*(v / 12 for v in _TWELFTHS), 0.0, *(-v / 12 for v in _TWELFTHS[1:]))
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

ELEMENTS = {
    "nf4": Element(4, high_first=True, values=_NF4),
    "fp4": Element(4, high_first=True, values=_FP4),
    "e2m1": Element(4, values=(*_E2M1, *(-v for v in _E2M1))),
    "e4m3": Element(8, dtype=torch.float8_e4m3fn),
}


@dataclass(frozen=True)
class Format:
    """The element type of a stack of matrices and the geometry of its scales.

    ``str(format)`` is what an operator takes; :func:`parse` reads it.

    Attributes:
        element: A key of :data:`ELEMENTS`.
        rows, columns: A block of this many rows and columns of a matrix shares a scale; the last blocks of a matrix may
            be smaller. ``rows`` is 0 where blocks are ``columns`` consecutive elements of the whole stack, as in
            bitsandbytes.
        nested: This many consecutive scales share a scale of their own, being codes of 8 bits; 0 where scales are
            numbers. Only with ``rows == 0``.
        transposed: The stored matrices are the transposes of those meant.
    """

    element: str
    rows: int
    columns: int
    nested: int = 0
    transposed: bool = False

    def __str__(self) -> str:
        return ":".join(str(int(v) if isinstance(v, bool) else v) for v in vars(self).values())

    @property
    def is_flat(self) -> bool:
        """True if blocks run through the whole stack instead of tiling each matrix."""
        return self.rows == 0

    @property
    def codes_per_byte(self) -> int:
        """2 for elements of 4 bits, else 1."""
        return 8 // ELEMENTS[self.element].bits

    @property
    def mT(self) -> Format:
        """The same codes, meant the other way round."""
        return replace(self, transposed=not self.transposed)


@functools.cache
def parse(text: str) -> Format:
    """The format that ``str`` made ``text`` of."""
    element, *numbers = text.split(":")
    values: list[Any] = [element, *map(int, numbers)]
    values[-1] = bool(values[-1])
    assert element in ELEMENTS, text
    return Format(*values)


@functools.cache
def element_values(element: str, device: torch.device) -> torch.Tensor:
    """``[16]`` or ``[256]`` float32, the value of each code."""
    kind = ELEMENTS[element]
    if kind.dtype is None:
        return torch.tensor(kind.values, dtype=torch.float32, device=device)
    return byte_values(kind.dtype).to(device)


@functools.cache
def byte_values(dtype: torch.dtype) -> torch.Tensor:
    """``[256]`` float32 on the CPU, the number that each byte is in an 8-bit floating dtype."""
    return torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8).view(dtype).float()
