"""Decoding, as plainly as it can be written: the oracle of the fast ways."""

from __future__ import annotations

import torch

from .formats import ELEMENTS, element_values
from .stack import QuantizedStack


def decode(stack: QuantizedStack, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The dense ``[E, N, K]``: ``value(code) * scale`` in float32, rounded once to ``dtype``."""
    experts, n, k = stack.stored_shape
    values = element_values(stack.format.element, stack.device)[_codes(stack).long()]
    if stack.format.is_flat:
        block = stack.format.columns
        scale = flat_scales(stack).repeat_interleave(block)[: values.numel()].view(experts, n, k)
    else:
        scale = stack.scales[0].float()
        for factor in stack.scales[1:]:
            scale = factor.view(-1, 1, 1) * scale
        scale = scale.repeat_interleave(stack.format.rows, 1)[:, :n]
        scale = scale.repeat_interleave(stack.format.columns, 2)[:, :, :k]
    dense = (values * scale).to(dtype or stack.dtype)
    return dense.mT if stack.format.transposed else dense


def _codes(stack: QuantizedStack) -> torch.Tensor:
    """``[E, n, k]``, one code an element."""
    element = ELEMENTS[stack.format.element]
    if element.bits == 8:
        return stack.codes
    low, high = stack.codes & 15, stack.codes >> 4
    pair = (high, low) if element.high_first else (low, high)
    return torch.stack(pair, dim=-1).view(stack.stored_shape)


def flat_scales(stack: QuantizedStack) -> torch.Tensor:
    """float32 for each block of a format with flat blocks."""
    scale, *rest = stack.scales
    if not rest:
        return scale
    values, absmax, offset = rest
    return values[scale.long()] * absmax.repeat_interleave(stack.format.nested)[: scale.numel()] + offset
