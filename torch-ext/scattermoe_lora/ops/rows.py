"""Tensors as rows that a kernel can read, in as few calls of torch as that takes."""

from __future__ import annotations

import torch


def rows_of(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor whose memory holds the rows of ``t`` ``[*, H]``, and their stride.

    That is ``t`` itself wherever a kernel can read its rows in place, which are each contiguous then. Its dimensions
    may be others than two: a kernel looks at none.
    """
    if t.is_contiguous():
        return t, t.shape[-1]
    if t.dim() != 2:
        t = t.reshape(-1, t.shape[-1])
    if t.stride(1) != 1:
        t = t.contiguous()
    return t, t.stride(0)
