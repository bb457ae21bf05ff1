"""The arguments of RMSNorm with rotary embedding, but for gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Operands(NamedTuple):
    """Rows, weight and angles.

    Attributes:
        x: ``[B, S, H, D]``, any strides.
        weight: ``[D]`` or None.
        cos, sin: ``[B or 1, S, rot]``, dtype of ``x`` or float32; None leaves the rotation out.
        eps: Added to the mean of squares.
    """

    x: torch.Tensor
    weight: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    eps: float

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype that ``x`` and ``cos`` promote to."""
        return self.x.dtype if self.cos is None else torch.promote_types(self.x.dtype, self.cos.dtype)
