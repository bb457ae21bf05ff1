"""Shares of a product's experts, so that few matrices of a quantized weight are dense at a time.

All are decoded, a share after the other. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..quantization import gpu
from ..quantization.stack import QuantizedStack, Weight
from ..routing import Routing
from .schedule import Scheduled

LowRank = tuple[torch.Tensor, torch.Tensor]
"""``[S, r]`` in sorted order and ``[E, N_out, r]``, any strides: the factors of a low-rank term."""

# A workspace holds at most this part of the experts, and of these as many as fit in so many bytes; one in any case.
SHARES = 8
WORKSPACE_BYTES = 1 << 27


def experts_at_a_time(stack: QuantizedStack) -> int:
    """The number of matrices that are decoded into a workspace together."""
    experts, n, k = stack.stored_shape
    return max(1, min(experts // SHARES, WORKSPACE_BYTES // (n * k * stack.dtype.itemsize)))


def shares(
    weight: Weight, routing: Routing, low: LowRank | None, bias: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, Scheduled, LowRank | None, torch.Tensor | None]]:
    """The dense weight, pairs, factors and bias of each of the launches that one product takes.

    A dense weight takes one. The matrices of a quantized one are decoded into a workspace, which the next share reuses.
    """
    routing = routing if isinstance(routing, Scheduled) else Scheduled(*routing)
    if not isinstance(weight, QuantizedStack):
        yield weight, routing, low, bias
        return
    experts, n, k = weight.stored_shape
    size = experts_at_a_time(weight)
    workspace = torch.empty((size, n, k), dtype=weight.dtype, device=weight.device)
    dense = workspace.mT if weight.format.transposed else workspace
    for start in range(0, experts, size):
        own = slice(start, min(start + size, experts))
        count = own.stop - start
        gpu.decode(weight, range(start, own.stop), workspace[:count])
        factors = None if low is None else (low[0], low[1][own])
        yield dense[:count], routing.share(own), factors, None if bias is None else bias[own]
