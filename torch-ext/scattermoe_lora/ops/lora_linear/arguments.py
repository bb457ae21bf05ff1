"""The arguments of dense projections with low-rank adapters, but for gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Operands(NamedTuple):
    """Rows, projections of them, and the pairs of factors that are added to these.

    Attributes:
        x: ``[T, N_in]``.
        weights: ``[N_p, N_in]`` for each projection ``p``. They, and the factors, are cast to the dtype of ``x``.
        a, b: ``[r_i, N_in]`` and ``[N_p, r_i]`` for each pair ``i``, in the order of the projections they belong to.
        biases: ``[N_p]`` each, any number for a projection.
        seed: A CPU tensor of one int64, from which the masks of dropout are drawn. None without dropout.
        projections: The projection ``p`` of each pair.
        scaling: The factor of each pair.
        dropout: The probability, of each pair, that an element of ``x`` is dropped on the way to ``a``; below 1.
        bias_projections, bias_scaling: The projection and the factor of each bias.
    """

    x: torch.Tensor
    weights: list[torch.Tensor]
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    biases: list[torch.Tensor]
    seed: torch.Tensor | None
    projections: list[int]
    scaling: list[float]
    dropout: list[float]
    bias_projections: list[int]
    bias_scaling: list[float]

    @property
    def ranks(self) -> list[int]:
        """The rank of each pair."""
        return [a.shape[0] for a in self.a]

    def pairs_of(self, projection: int) -> range:
        """The pairs of a projection, which are consecutive."""
        first = sum(p < projection for p in self.projections)
        return range(first, first + self.projections.count(projection))

    def columns_of(self, pairs: range) -> slice:
        """The columns that consecutive pairs have in the low-rank products of all."""
        start = sum(self.ranks[: pairs.start])
        return slice(start, start + sum(self.ranks[pairs.start : pairs.stop]))
