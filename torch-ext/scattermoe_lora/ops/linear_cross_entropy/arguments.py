"""The arguments of the loss over a vocabulary, but for gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Operands(NamedTuple):
    """Hidden states, and the head that makes logits of them.

    Attributes:
        hidden: ``[T, H]``, contiguous.
        weight: ``[V, H]``, contiguous; used in the dtype of ``hidden``.
        bias: ``[V]`` or None.
        low: ``[T, r]`` or None: ``A hidden``, the smaller side of a LoRA pair.
        b: ``[V, r]``, the other factor, multiplied by its scaling; given with ``low``.
        labels: ``[T]`` int64; tokens with a negative one are left out.
        class_weight: ``[V]`` or None: what :attr:`Statistics.logit_sum` weights logits by.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    low: torch.Tensor | None
    b: torch.Tensor | None
    labels: torch.Tensor
    class_weight: torch.Tensor | None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and sums: float32, or float64 for float64."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32


DIFFERENTIABLE = 5
"""The number of :class:`Operands` that get gradients: the first ones."""


class Settings(NamedTuple):
    """What logits go through, and which statistics of them are asked for.

    Attributes:
        scale: Factor of the logits, applied before the soft cap.
        softcap: ``c`` of ``c * tanh(logits / c)``; 0 for none.
        sums: Whether :attr:`Statistics.logit_sum` is asked for.
        entropies: Whether :attr:`Statistics.entropy` is.
        pulls: Whether :attr:`Statistics.pull` is, where an implementation has it.
    """

    scale: float
    softcap: float
    sums: bool
    entropies: bool
    pulls: bool


class Statistics(NamedTuple):
    """What a loss needs to know of each token's logits, ``[T]`` in float32 (float64 for float64).

    Zero for tokens that are left out. Empty where not asked for.

    Attributes:
        lse: ``log(sum(exp(logits)))``.
        label_logit: The label's logit.
        logit_sum: The sum of all logits, each multiplied by its class weight.
        entropy: ``-sum(p * log(p))`` of ``p = softmax(logits)``.
        pull: ``[T, H]``, dtype of ``hidden``: the derivative of ``lse`` by ``hidden`` without the label's term. With it
            the backward has nothing to multiply. Empty also where an implementation does not compute it.
    """

    lse: torch.Tensor
    label_logit: torch.Tensor
    logit_sum: torch.Tensor
    entropy: torch.Tensor
    pull: torch.Tensor


class StatisticsGradients(NamedTuple):
    """Gradients of the first four of :class:`Statistics`, ``[T]`` each; None for those that nothing depends on."""

    d_lse: torch.Tensor | None
    d_label_logit: torch.Tensor | None
    d_logit_sum: torch.Tensor | None
    d_entropy: torch.Tensor | None

    def or_zeros(self, like: torch.Tensor) -> list[torch.Tensor]:
        """The four of them; zeros for None, and for those of statistics that nobody asked for, which are empty."""
        return [
            torch.zeros_like(like) if gradient is None or gradient.shape != like.shape else gradient
            for gradient in self
        ]
