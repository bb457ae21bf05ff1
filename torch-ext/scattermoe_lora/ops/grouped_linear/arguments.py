"""The tensors that the grouped linear operators take."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..quantization.stack import Weight, put_together, take_apart
from ..routing import Routing


class Quantization(NamedTuple):
    """What the codes in a weight's place mean.

    Attributes:
        scales: Those of a :class:`scattermoe_lora.ops.quantization.stack.QuantizedStack`.
        format: Its format as text.
    """

    scales: list[torch.Tensor]
    format: str


class Operands(NamedTuple):
    """Rows, per-expert parameters and routing.

    Attributes:
        x: ``[T, N_in]`` (a token's row serves its K pairs) or ``[S, N_in]``.
        weight: ``[E, N_out, N_in]``, contiguous, a transposed view of a contiguous ``[E, N_in, N_out]``, or quantized.
        a, b: ``[E, r, N_in]`` and ``[E, N_out, r]``, the scaling already in ``b``, or None.
        bias: ``[E, N_out]`` or None.
        order, offsets: ``[S]`` and ``[E + 1]``, the fields of a :class:`scattermoe_lora.ops.routing.Routing`.
    """

    x: torch.Tensor
    weight: Weight
    a: torch.Tensor | None
    b: torch.Tensor | None
    bias: torch.Tensor | None
    order: torch.Tensor
    offsets: torch.Tensor

    def take_apart(self) -> tuple[Operands, Quantization]:
        """The operands with codes for a quantized weight, and what these mean."""
        weight, scales, text = take_apart(self.weight)
        return self._replace(weight=weight), Quantization(scales, text)

    def put_together(self, quantization: Quantization) -> Operands:
        """The operands of :meth:`take_apart`."""
        return self._replace(weight=put_together(self.weight, *quantization, self.x.dtype))

    @property
    def routing(self) -> Routing:
        """The pairs, sorted by expert."""
        return Routing(self.order, self.offsets)

    def pairs_per_row(self, top_k: int) -> int:
        """The number of pairs that a row of ``x`` serves: 1 where each has its own, else ``top_k``."""
        return 1 if self.x.shape[0] == self.order.shape[0] else top_k

    def rows(self, top_k: int) -> torch.Tensor:
        """``[S]``, the row of ``x`` that the pair at each sorted position reads."""
        divisor = self.pairs_per_row(top_k)
        return self.order if divisor == 1 else self.order // divisor
