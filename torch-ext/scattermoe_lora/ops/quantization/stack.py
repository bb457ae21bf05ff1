"""A stack of quantized matrices, one for each expert, in the place of a dense ``[E, N, K]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from .formats import ELEMENTS, Format, parse

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a stack decodes to."""
_SCALES = (*FLOATS, torch.float8_e8m0fnu, torch.float8_e4m3fn)


@dataclass(frozen=True, eq=False)
class QuantizedStack:
    """Quantized matrices ``[E, N, K]``: their codes, their scales and what these mean.

    It has the attributes by which code reads a dense stack's sizes (``shape``, ``dtype``, ``device``, ``mT``), and
    :meth:`operands` are what a torch operator takes in the place of the one tensor.

    Attributes:
        codes: uint8, contiguous ``[E, n, k]`` as stored (``[E, n, k // 2]`` with two codes a byte), where ``n, k`` is
            ``K, N`` if ``format.transposed``.
        scales: With blocks that tile each matrix, ``[E, ceil(n / rows), ceil(k / columns)]`` (any strides) of float32,
            bfloat16, float16, float8_e8m0fnu or float8_e4m3fn, and perhaps float32 ``[E]`` that multiplies it. With
            flat blocks float32 ``[blocks]``; or, nested, uint8 ``[blocks]``, the 256 values of these, float32
            ``[ceil(blocks / nested)]`` and the offset that is added, a float32 scalar.
        format: Element type and blocks.
        dtype: The dtype that the matrices stand for, and decode to by default.
    """

    codes: torch.Tensor
    scales: tuple[torch.Tensor, ...]
    format: Format
    dtype: torch.dtype

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """``(E, n, k)`` of the matrices as they are stored."""
        experts, n, k = self.codes.shape
        return experts, n, k * self.format.codes_per_byte

    @property
    def shape(self) -> torch.Size:
        """``[E, N, K]`` of the matrices that are meant."""
        experts, n, k = self.stored_shape
        return torch.Size((experts, k, n) if self.format.transposed else (experts, n, k))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def mT(self) -> QuantizedStack:
        """The transposed matrices, of the same storage."""
        return QuantizedStack(self.codes, self.scales, self.format.mT, self.dtype)

    @property
    def requires_grad(self) -> bool:
        """True if a scale requires a gradient, which nothing computes: see :meth:`check`."""
        return any(scale.requires_grad for scale in self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; an expanded one counts as stored."""
        return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (self.codes, *self.scales))

    def operands(self) -> tuple[torch.Tensor, list[torch.Tensor], str]:
        """Codes, scales and format, as a torch operator takes them."""
        return self.codes, list(self.scales), str(self.format)

    @classmethod
    def from_operands(
        cls, codes: torch.Tensor, scales: Sequence[torch.Tensor], text: str, dtype: torch.dtype
    ) -> QuantizedStack:
        """The stack of :meth:`operands`."""
        return cls(codes, tuple(scales), parse(text), dtype)

    def check(self, name: str) -> QuantizedStack:
        """Itself, if its parts fit together; nothing is read but shapes, dtypes and devices.

        Args:
            name: The parameter's, for messages.

        Raises:
            ValueError: A part has the wrong shape, dtype or device; the message names parameter, expected and got.
            NotImplementedError: A scale requires a gradient.
        """
        element = ELEMENTS[self.format.element]
        _expect(name, "dtype of its codes", torch.uint8, self.codes.dtype)
        if self.codes.dim() != 3 or 0 in self.codes.shape or not self.codes.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous codes [E, n, k] with {element.bits} bits an element, got "
                f"{list(self.codes.shape)} with strides {list(self.codes.stride())}"
            )
        _expect_dtype(name, "the dtype it stands for", FLOATS, self.dtype)
        numbers = ((4,) if self.format.nested else (1,)) if self.format.is_flat else (1, 2)
        if len(self.scales) not in numbers:
            expected = " or ".join(map(str, numbers))
            raise ValueError(f"{name}: expected {expected} tensors for its scales, got {len(self.scales)}")
        (self._check_flat if self.format.is_flat else self._check_grid)(name)
        for scale in self.scales:
            _expect(name, "device of its scales", self.device, scale.device)
        if self.requires_grad:
            raise NotImplementedError(
                f"{name}: a quantized weight is frozen, but one of its scales requires a gradient; train low-rank "
                "factors beside it, or the dense weight"
            )
        return self

    def _check_grid(self, name: str) -> None:
        experts, n, k = self.stored_shape
        rows, columns = self.format.rows, self.format.columns
        scale, *factors = self.scales
        shape = [experts, -(-n // rows), -(-k // columns)]
        _expect(name, f"scales, one for {rows} x {columns} elements, of shape", shape, list(scale.shape))
        _expect_dtype(name, "dtype of its scales", _SCALES, scale.dtype)
        for factor in factors:
            _expect(name, "a scale for each expert, of shape", [experts], list(factor.shape))
            _expect(name, "dtype of the scale for each expert", torch.float32, factor.dtype)

    def _check_flat(self, name: str) -> None:
        block, nested = self.format.columns, self.format.nested
        blocks = -(-self.codes.numel() * self.format.codes_per_byte // block)
        scale, *rest = self.scales
        _expect(name, f"scales, one for {block} elements, of shape", [blocks], list(scale.shape))
        _expect(name, "dtype of its scales", torch.uint8 if nested else torch.float32, scale.dtype)
        if not nested:
            return
        values, absmax, offset = rest
        _expect(name, "values of the codes of its scales, of shape", [256], list(values.shape))
        expected = [-(-blocks // nested)]
        _expect(name, f"scales, one for {nested} scales, of shape", expected, list(absmax.shape))
        _expect(name, "offset of its scales, of shape", [], list(offset.shape))
        for tensor in rest:
            _expect(name, "dtype of the scales of its scales", torch.float32, tensor.dtype)

    def refuse_nan(self, name: str) -> None:
        """Raises ValueError where a scale is NaN or infinite. It reads them all: for where weights are loaded."""
        for scale in self.scales:
            if scale.dtype != torch.uint8 and (count := int((~scale.float().isfinite()).sum())):
                raise ValueError(f"{name}: expected finite scales, got {count} that are NaN or infinite")


def concatenate(stacks: Sequence[QuantizedStack]) -> QuantizedStack:
    """One stack of all the matrices, in order; all of one format with a single level of scales.

    Raises:
        ValueError: Flat blocks that would cross from one stack to the next.
    """
    first = stacks[0]
    codes = torch.cat([stack.codes for stack in stacks])
    scales = torch.cat([stack.scales[0] for stack in stacks])
    return QuantizedStack(codes, (scales,), first.format, first.dtype).check("concatenate")


Weight = Annotated[torch.Tensor | QuantizedStack, torch.Tensor]
"""A dense stack of matrices or a quantized one. An operator takes a tensor: the dense stack, or the codes."""


def take_apart(weight: Weight) -> tuple[torch.Tensor, list[torch.Tensor], str]:
    """A weight as an operator takes it: tensor, scales and format, which is empty for a dense weight."""
    return weight.operands() if isinstance(weight, QuantizedStack) else (weight, [], "")


def put_together(weight: Weight, scales: Sequence[torch.Tensor], text: str, dtype: torch.dtype) -> Weight:
    """The weight of :func:`take_apart`; the matrices of a quantized one stand for ``dtype``."""
    if not text:
        return weight
    assert isinstance(weight, torch.Tensor)
    return QuantizedStack.from_operands(weight, scales, text, dtype)


def _expect(name: str, quality: str, expected: object, got: object) -> None:
    if expected != got:
        raise ValueError(f"{name}: expected {quality} {expected}, got {got}")


def _expect_dtype(name: str, quality: str, expected: Sequence[torch.dtype], got: torch.dtype) -> None:
    if got not in expected:
        raise ValueError(f"{name}: expected {quality} among {', '.join(map(str, expected))}, got {got}")
