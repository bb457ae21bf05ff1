"""The tensors that the fused experts operators take and keep."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..routing import Routing


class Operands(NamedTuple):
    """The layer's input, parameters and routing, of one floating dtype but for ``routing_weights``.

    Attributes:
        x: ``[T, H]``.
        gate_up: ``[E, 2I, H]``, contiguous or a transposed view of a contiguous ``[E, H, 2I]``.
        down: ``[E, H, I]``, likewise.
        routing_weights: ``[T, K]``, any floating dtype.
        gate_up_a, gate_up_b: ``[E, r1, H]`` and ``[E, 2I, r1]``, the scaling already in ``b``, or None.
        down_a, down_b: ``[E, r2, I]`` and ``[E, H, r2]``, or None.
        gate_up_bias, down_bias: ``[E, 2I]`` and ``[E, H]``, or None.
        order, offsets: ``[S]`` and ``[E + 1]``, the fields of a :class:`scattermoe_lora.ops.routing.Routing`.
    """

    x: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    routing_weights: torch.Tensor
    gate_up_a: torch.Tensor | None
    gate_up_b: torch.Tensor | None
    down_a: torch.Tensor | None
    down_b: torch.Tensor | None
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    order: torch.Tensor
    offsets: torch.Tensor

    @property
    def routing(self) -> Routing:
        """The pairs, sorted by expert."""
        return Routing(self.order, self.offsets)

    @property
    def ranks(self) -> tuple[int, int]:
        """``(r1, r2)``; 0 where there are no factors."""
        a1, a2 = self.gate_up_a, self.down_a
        return 0 if a1 is None else a1.shape[1], 0 if a2 is None else a2.shape[1]


class Kept(NamedTuple):
    """Intermediate results that the forward keeps for the backward, in sorted order.

    Attributes:
        hidden: ``[S, 2I]``, the gate/up projection.
        gate_up_low, down_low: ``[S, r1]`` and ``[S, r2]``, the products ``x A^T`` of both projections.
    """

    hidden: torch.Tensor
    gate_up_low: torch.Tensor
    down_low: torch.Tensor
