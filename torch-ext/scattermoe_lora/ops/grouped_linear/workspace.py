"""Shares of a product's experts, so that few matrices of a quantized weight are dense at a time.

All are decoded, a share after the other. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..quantization import gpu
from ..quantization.stack import QuantizedStack

LowRank = tuple[torch.Tensor, torch.Tensor]
"""``[S, r]`` in sorted order and ``[E, N_out, r]``, any strides: the factors of a low-rank term."""

# A workspace holds at most this part of the experts, and of these as many as fit in so many bytes; one in any case.
# Each share costs two launches, and a last round of tiles for which there are too few to fill the device.
SHARES = 4
WORKSPACE_BYTES = 1 << 28


class Workspace:
    """Room for the dense matrices of a share of a quantized weight's experts.

    Attributes:
        size: Experts of a share; the last may have fewer.
        dense: ``[size, N, K]``, in the layout of the weight.
    """

    def __init__(self, weight: QuantizedStack) -> None:
        self._weight = weight
        experts, n, k = weight.stored_shape
        self.size = max(1, min(experts // SHARES, WORKSPACE_BYTES // (n * k * weight.dtype.itemsize)))
        self._stored = torch.empty((self.size, n, k), dtype=weight.dtype, device=weight.device)
        self.dense = self._stored.mT if weight.format.transposed else self._stored

    def decoded_shares(self) -> Iterator[slice]:
        """The experts of each share, when they have been decoded; the next share takes their place."""
        operands, experts = gpu.kernel_operands(self._weight), self._weight.shape[0]
        for start in range(0, experts, self.size):
            share = slice(start, min(start + self.size, experts))
            numbers = range(start, share.stop)
            gpu.decode(self._weight, numbers, self._stored, operands)
            yield share
