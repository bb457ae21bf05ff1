"""The tensors that the fused experts operators take and keep."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..quantization.stack import Weight, put_together, take_apart
from ..routing import Routing


class Quantization(NamedTuple):
    """What the codes in the weights' places mean; for a dense weight no scales and an empty format.

    Attributes:
        gate_up_scales, down_scales: Those of a :class:`scattermoe_lora.ops.quantization.stack.QuantizedStack`.
        gate_up_format, down_format: Its format as text.
    """

    gate_up_scales: list[torch.Tensor]
    gate_up_format: str
    down_scales: list[torch.Tensor]
    down_format: str


class Operands(NamedTuple):
    """The layer's input, parameters and routing, of one floating dtype but for ``routing_weights``.

    Attributes:
        x: ``[T, H]``.
        gate_up: ``[E, 2I, H]``, contiguous, a transposed view of a contiguous ``[E, H, 2I]``, or quantized.
        down: ``[E, H, I]``, likewise.
        routing_weights: ``[T, K]``, any floating dtype.
        gate_up_a, gate_up_b: ``[E, r1, H]`` and ``[E, 2I, r1]``, the scaling already in ``b``, or None.
        down_a, down_b: ``[E, r2, I]`` and ``[E, H, r2]``, or None.
        gate_up_bias, down_bias: ``[E, 2I]`` and ``[E, H]``, or None.
        order, offsets: ``[S]`` and ``[E + 1]``, the fields of a :class:`scattermoe_lora.ops.routing.Routing`.
    """

    x: torch.Tensor
    gate_up: Weight
    down: Weight
    routing_weights: torch.Tensor
    gate_up_a: torch.Tensor | None
    gate_up_b: torch.Tensor | None
    down_a: torch.Tensor | None
    down_b: torch.Tensor | None
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    order: torch.Tensor
    offsets: torch.Tensor

    def take_apart(self) -> tuple[Operands, Quantization]:
        """The operands with codes for quantized weights, and what these mean."""
        gate_up, gate_up_scales, gate_up_format = take_apart(self.gate_up)
        down, down_scales, down_format = take_apart(self.down)
        quantization = Quantization(gate_up_scales, gate_up_format, down_scales, down_format)
        return self._replace(gate_up=gate_up, down=down), quantization

    def put_together(self, quantization: Quantization) -> Operands:
        """The operands of :meth:`take_apart`."""
        gate_up = put_together(self.gate_up, *quantization[:2], self.x.dtype)
        return self._replace(gate_up=gate_up, down=put_together(self.down, *quantization[2:], self.x.dtype))

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
