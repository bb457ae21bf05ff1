"""The arguments of RMSNorm, but for gradients and the residual."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Operands(NamedTuple):
    """Rows and weight.

    Attributes:
        x: ``[*, H]``, any strides.
        weight: ``[H]`` or None.
        eps: Added to the mean of squares.
        offset: Added to the weight.
        round_first: Whether the normalised rows are rounded to the dtype of ``x`` before the weight multiplies them.
    """

    x: torch.Tensor
    weight: torch.Tensor | None
    eps: float
    offset: float
    round_first: bool

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of ``x``, or with ``round_first`` what it and the weight's promote to."""
        if self.weight is None or not self.round_first:
            return self.x.dtype
        return torch.promote_types(self.x.dtype, self.weight.dtype)
