"""What a launch of a Triton kernel computes on the host, in as little time as that takes.

A training step makes hundreds of launches, and a fast GPU waits for the slowest of them. Triton's own ``cdiv`` and
``next_power_of_2`` are for kernels; a call of them from Python takes as long as the rest of a launch's arguments.
"""

from __future__ import annotations

import torch


def cdiv(x: int, y: int) -> int:
    """``x / y``, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def contiguous_like(t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialized contiguous tensor of the shape of ``t``, in half the time of ``new_empty``."""
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def rows_of(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor whose memory holds the rows of ``t`` ``[*, H]``, and their stride.

    That is ``t`` itself wherever a kernel can read its rows in place, each of which is contiguous then. Its dimensions
    may be others than two: a kernel looks at none.
    """
    if t.is_contiguous():
        return t, t.shape[-1]
    if t.dim() != 2:
        t = t.reshape(-1, t.shape[-1])
    if t.stride(1) != 1:
        t = t.contiguous()
    return t, t.stride(0)
