"""Decoding on a CPU, a matrix at a time.

Scalar lookups are what costs here: torch's own cast from float8 makes one an element. Codes become float16 by integer
operations on whole vectors instead, where a format's values have few digits: its bits put where float16 has its own
give the value times a power of two. NF4's have all digits of float32. bitsandbytes' decoder is called where it is
loaded, and else a table has the values of both codes of a byte.

Those integers take as many bytes as bfloat16, so they are written where the result will be: all of a matrix by one
call, as each costs a start and, on a busy machine, a wait for the slowest core.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import overload

import torch

from .formats import ELEMENTS, byte_values, element_values
from .stack import QuantizedStack

# Elements that are scaled and rounded at a time through float32: 2 MB.
_CHUNK_ELEMENTS = 1 << 19


class Decoder:
    """Decodes matrices of one stack, through a buffer of 2 MB or a block that serves one after the other."""

    def __init__(self, stack: QuantizedStack) -> None:
        self._stack = stack
        self._buffer = torch.empty(0)

    def decode(self, expert: int, out: torch.Tensor) -> torch.Tensor:
        """The matrix of one expert, as stored, into ``out``: contiguous, of the dtype to decode to."""
        layout = self._stack.format
        if layout.is_flat:
            self._decode_flat(expert, out.view(-1))
            return out
        scales = self._scales(expert)
        values, power = _values[layout.element]
        numbers = values(self._stack.codes[expert], _integers(out))
        # Both are exact where nothing overflows, and there are fewer scales than elements.
        large = scales * power
        is_finite = bool(large.isfinite().all())
        scales = large if is_finite else scales
        for first, last in _chunks(out.shape[0], layout.rows, out.shape[1]):
            part = out[first:last]
            wide = self._float32(part).copy_(numbers[first:last])
            if not is_finite:
                wide.mul_(power)
            blocks = slice(first // layout.rows, -(-last // layout.rows))
            multiply_blocks(wide, scales[blocks], layout.rows, layout.columns)
            _round(wide, part)
        return out

    def _float32(self, out: torch.Tensor) -> torch.Tensor:
        """A buffer for float32 of the shape of ``out``, or ``out`` itself."""
        if out.dtype == torch.float32:
            return out
        if self._buffer.numel() < out.numel():
            self._buffer = out.new_empty(out.numel(), dtype=torch.float32)
        return self._buffer[: out.numel()].view(out.shape)

    def _scales(self, expert: int) -> torch.Tensor:
        scale, *factors = self._stack.scales
        scale = scale[expert]
        scale = _looked_up(scale) if scale.itemsize == 1 else scale.float()
        for factor in factors:
            scale = factor[expert] * scale
        return scale

    def _decode_flat(self, expert: int, out: torch.Tensor) -> None:
        """As bitsandbytes has no notion of a matrix, its first and last block may belong to a neighbour, too."""
        block, size = self._stack.format.columns, out.numel()
        codes, start = self._stack.codes.view(-1), expert * size
        first, last = start // block, -(-(start + size) // block)
        begin, end = first * block, min(last * block, codes.numel() * 2)
        whole = out if (begin, end) == (start, start + size) else out.new_empty(end - begin)
        self._decode_blocks(codes[begin // 2 : end // 2], self._flat_scales(first, last), whole)
        if whole is not out:
            out.copy_(whole[start - begin :][:size])

    def _flat_scales(self, first: int, last: int) -> torch.Tensor:
        scale, *rest = self._stack.scales
        scale = scale[first:last]
        if not rest:
            return scale
        values, absmax, offset = rest
        nested = self._stack.format.nested
        start = first // nested
        shared = absmax[start : -(-last // nested)].repeat_interleave(nested)[first - start * nested :]
        return values.index_select(0, scale.long()).mul_(shared[: last - first]).add_(offset)

    def _decode_blocks(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        element, block = self._stack.format.element, self._stack.format.columns
        # Beyond 1024 it calls torch.compile.
        if block <= 1024 and out.numel() % block == 0 and has_bitsandbytes():
            operator = torch.ops.bitsandbytes.dequantize_4bit.default
            # As a matrix with a block in a row: it mistakes the scales of blocks that do not end with a row.
            shape = [scales.numel(), block]
            out.view(shape).copy_(operator(codes, scales, block, element, shape, out.dtype))
            return
        for first, last in _chunks(out.numel(), block, 1):
            part = out[first:last]
            wide = self._float32(part)
            _look_up(_pairs(element), codes[first // 2 : last // 2], wide.view(torch.int64))
            multiply_blocks(
                wide.view(1, -1), scales[first // block : -(-last // block)].view(1, -1), 1, block
            )
            _round(wide, part)


class Matrices(Sequence[torch.Tensor]):
    """The matrices of a quantized stack, each decoded when it is asked for, as ``dense.unbind()`` would list them.

    All share one workspace: a matrix is valid until the next one is asked for.

    Args:
        stack: Quantized matrices ``[E, N, K]``.
        dtype: The dtype to decode to; by default the one that the stack stands for.
    """

    def __init__(self, stack: QuantizedStack, dtype: torch.dtype | None = None) -> None:
        self._stack, self._decoder = stack, Decoder(stack)
        self._workspace = torch.empty(stack.stored_shape[1:], dtype=dtype or stack.dtype, device=stack.device)

    def __len__(self) -> int:
        return self._stack.shape[0]

    @overload
    def __getitem__(self, expert: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, expert: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, expert: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        if isinstance(expert, slice):
            raise TypeError("matrices of a quantized stack share a workspace: ask for one at a time")
        matrix = self._decoder.decode(expert, self._workspace)
        return matrix.mT if self._stack.format.transposed else matrix


def _chunks(rows: int, block: int, columns: int) -> Iterator[tuple[int, int]]:
    """First and last row of chunks that end with a block of rows; within one that holds all rows, they end anywhere."""
    step = block if block < rows else 1
    step *= max(1, _CHUNK_ELEMENTS // (step * columns))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _integers(out: torch.Tensor) -> torch.Tensor:
    """An int16 for each element of ``out``: in its own memory, unless its elements have another size."""
    return out.view(torch.int16) if out.itemsize == 2 else torch.empty_like(out, dtype=torch.int16)


def _round(wide: torch.Tensor, out: torch.Tensor) -> None:
    if out.dtype != torch.float32:
        out.copy_(wide)


def decode(stack: QuantizedStack, experts: Sequence[int], out: torch.Tensor) -> torch.Tensor:
    """The matrices of some experts, as stored, into ``out`` ``[len(experts), n, k]``."""
    decoder = Decoder(stack)
    for expert, matrix in zip(experts, out.unbind(), strict=True):
        decoder.decode(expert, matrix)
    return out


@functools.cache
def _registered() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::dequantize_4bit", "CPU")


def has_bitsandbytes() -> bool:
    """True if bitsandbytes is loaded, with its library for CPUs."""
    return hasattr(torch.ops.bitsandbytes, "dequantize_4bit") and _registered()


@functools.cache
def _pairs(element: str) -> torch.Tensor:
    """``[256]``, the float32 values of both codes of each byte, side by side as an int64."""
    values = element_values(element, torch.device("cpu"))
    first, second = values.repeat_interleave(16), values.repeat(16)
    pair = (first, second) if ELEMENTS[element].high_first else (second, first)
    return torch.stack(pair, dim=-1).view(torch.int64).view(-1)


def _look_up(table: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
    """``table[codes]``, of one dimension each, into ``out``."""
    # As rows: index_select, and gather of a single row, run on one core.
    shape = (-1, math.gcd(codes.numel(), 1024))
    index = codes.long().view(shape)
    torch.gather(table.expand(index.shape[0], -1), 1, index, out=out.view(shape))


def _looked_up(floats: torch.Tensor) -> torch.Tensor:
    """An 8-bit float tensor in float32, faster than by torch's cast."""
    index = floats.contiguous().view(torch.uint8).view(-1).long()
    return byte_values(floats.dtype).index_select(0, index).view(floats.shape)


def _e4m3(codes: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """float16 values of E4M3, exactly, times 2^-8, in the memory of ``bits``."""
    # The greatest byte, and the greatest of signed bytes, are the two codes for NaN, which bits alone do not make one.
    if int(codes.amax()) == 0xFF or int(codes.view(torch.int8).amax()) == 0x7F:
        return bits.view(torch.float16).copy_(codes.view(torch.float8_e4m3fn)).mul_(2.0**-8)
    # With its sign extended, 7 places further left each bit but the second has its place in float16.
    bits.copy_(codes.view(torch.int8)).mul_(1 << 7).bitwise_and_(~0x4000)
    return bits.view(torch.float16)


def _e2m1(codes: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """float16 values of two E2M1 a byte, exactly, times 2^-14, in the memory of ``bits``."""
    # The lower code in the top bits of the lower half of an int32, the upper code in those of the upper half.
    bits.view(torch.int32).copy_(codes).mul_((1 << 12) + (1 << 24))
    # 3 places to the right, the sign repeated, exponent and digit stand where float16 has them.
    bits.bitwise_right_shift_(3).bitwise_and_(~0x71FF)
    return bits.view(torch.float16)


# Of each element type float16 values, and what these are to be multiplied by.
_values = {"e4m3": (_e4m3, 2.0**8), "e2m1": (_e2m1, 2.0**14)}


def multiply_blocks(matrix: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> None:
    """``matrix[i, j] *= scales[i // rows, j // columns]``, in place."""
    for i, i_blocks in _parts(matrix.shape[0], rows):
        for j, j_blocks in _parts(matrix.shape[1], columns):
            scale = scales[i_blocks, j_blocks]
            part = matrix[i, j].unflatten(1, (scale.shape[1], -1)).unflatten(0, (scale.shape[0], -1))
            part.mul_(scale[:, None, :, None])


def _parts(size: int, block: int) -> Iterator[tuple[slice, slice]]:
    """The elements and the blocks that are whole, and those of the last one that is not."""
    count, rest = divmod(size, block)
    if count:
        yield slice(0, count * block), slice(0, count)
    if rest:
        yield slice(count * block, size), slice(count, count + 1)
