"""GELU by tanh of 16-bit numbers on a CPU, looked up: there are 65,536, and computing takes three times as long."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..activation import act, act_backward

_NUMBERS = 1 << 16
# torch looks up with one thread, and computes with all that it has.
_MOST_THREADS = 2
# A vectorized function computes by other code, to other last bits, what is left of a thread's share after the last two
# registers of 512 bits.
_ALIGNMENT = 64


class Table(NamedTuple):
    """An activation of every number of a dtype, and its derivative, by the number's bits.

    Attributes:
        values: ``[65536]``, in bfloat16 for bfloat16, as PyTorch rounds; in float32 for float16.
        slopes: ``[65536]``, float32.
    """

    values: torch.Tensor
    slopes: torch.Tensor


def find(activation: str, x: torch.Tensor) -> Table | None:
    """The table for ``x``, or None where computing is as fast or gives other bits."""
    threads = torch.get_num_threads()
    is_served = (
        activation == "gelu_tanh"
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.numel() >= _NUMBERS
        and threads <= _MOST_THREADS
        and x.is_contiguous()
        and x.numel() % (threads * _ALIGNMENT) == 0
    )
    return _table(activation, x.dtype) if is_served else None


def look_up(column: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The numbers of a table's ``column`` for the elements of ``x``, into the contiguous ``out`` of its shape."""
    positions = x.view(torch.uint16).reshape(-1).to(torch.int32)
    torch.index_select(column, 0, positions, out=out.view(-1))
    return out


@functools.cache
def _table(activation: str, dtype: torch.dtype) -> Table:
    numbers = torch.arange(_NUMBERS, dtype=torch.int32, device="cpu").to(torch.uint16).view(dtype)
    wide = numbers.float()
    slopes = act_backward(activation, torch.ones_like(wide), wide, out=torch.empty_like(wide))
    return Table(act(activation, wide if dtype == torch.float16 else numbers), slopes)
