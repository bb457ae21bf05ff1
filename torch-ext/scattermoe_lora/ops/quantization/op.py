"""Decoding as a torch operator, for where a compiler makes a graph of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import dispatch
from .decode import decode
from .formats import parse
from .stack import QuantizedStack


@torch.library.custom_op("scattermoe_lora::decode_experts", mutates_args=())
def decode_experts(
    codes: torch.Tensor,
    scales: Sequence[torch.Tensor],
    layout: str,
    dtype: torch.dtype,
    experts: Sequence[int] | None = None,
) -> torch.Tensor:
    """The dense ``[len(experts), N, K]`` of some experts of a stack.

    Args:
        codes, scales, layout: :meth:`QuantizedStack.operands`.
        dtype: The result's.
        experts: Their numbers; None for all.
    """
    stack = QuantizedStack.from_operands(codes, scales, layout, dtype)
    with dispatch.undisturbed(codes):
        return decode(stack, slice(None) if experts is None else experts)


@decode_experts.register_fake
def _(
    codes: torch.Tensor,
    scales: Sequence[torch.Tensor],
    layout: str,
    dtype: torch.dtype,
    experts: Sequence[int] | None = None,
) -> torch.Tensor:
    all_experts, n, k = codes.shape
    form = parse(layout)
    out = codes.new_empty(
        (all_experts if experts is None else len(experts), n, k * form.codes_per_byte), dtype=dtype
    )
    return out.mT if form.transposed else out
