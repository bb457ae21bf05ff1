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
        peaks: Whether :attr:`Statistics.peak` is.
        pulls: Whether :attr:`Statistics.pull` is, where an implementation has it.
    """

    scale: float
    softcap: float
    sums: bool
    entropies: bool
    peaks: bool
    pulls: bool


class Statistics(NamedTuple):
    """What a loss needs to know of each token's logits, ``[T]`` in float32 (float64 for float64).

    Zero for tokens that are left out. Empty where not asked for.

    Attributes:
        lse: ``log(sum(exp(logits)))``.
        label_logit: The label's logit.
        logit_sum: The sum of all logits, each multiplied by its class weight.
        entropy: ``-sum(p * log(p))`` of ``p = softmax(logits)``.
        peak: The largest logit. It has no gradient.
        pull: ``[T, H]``, dtype of ``hidden``: the derivative of ``lse`` by ``hidden`` without the label's term. With it
            the backward has nothing to multiply. Empty also where an implementation does not compute it.
    """

    lse: torch.Tensor
    label_logit: torch.Tensor
    logit_sum: torch.Tensor
    entropy: torch.Tensor
    peak: torch.Tensor
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


class Objective(NamedTuple):
    """A weighted sum of the tokens' losses: of each token a factor ``[T]`` of each of its terms, dtype of the logits.

    Zero for tokens that are left out. None for a term that no token has.

    Attributes:
        own: Factor of ``-log p`` of the label.
        smooth: Of the sum of ``-log p`` over the vocabulary, each multiplied by its class weight.
        square: Of ``lse^2``.
    """

    own: torch.Tensor
    smooth: torch.Tensor | None
    square: torch.Tensor | None

    def of(self, tokens: slice | torch.Tensor) -> Objective:
        """That of some tokens."""
        return Objective._make(None if factor is None else factor[tokens] for factor in self)

    def terms(
        self, statistics: Statistics, class_weight: torch.Tensor | None, words: int
    ) -> list[torch.Tensor | None]:
        """``[T]`` each, what the factors multiply; None for a term that no token has."""
        lse, label_logit, logit_sum, *_ = statistics
        smooth = None if self.smooth is None else lse * self._total(class_weight, words) - logit_sum
        return [lse - label_logit, smooth, None if self.square is None else lse.square()]

    def by_token(self, statistics: Statistics, class_weight: torch.Tensor | None, words: int) -> torch.Tensor:
        """``[T]``, what each token adds to the sum."""
        own, *others = self.terms(statistics, class_weight, words)
        assert own is not None
        loss = self.own * own
        for factor, term in zip(self[1:], others, strict=True):
            if factor is not None and term is not None:
                loss = loss + factor * term
        return loss

    def gradients(
        self, statistics: Statistics, class_weight: torch.Tensor | None, words: int
    ) -> list[torch.Tensor]:
        """``[T]``, the derivatives of the sum by the first four statistics."""
        d_lse, zeros = self.slope(class_weight, words), torch.zeros_like(self.own)
        if self.square is not None:
            d_lse = d_lse + 2 * self.square * statistics.lse
        return [d_lse, -self.own, zeros if self.smooth is None else -self.smooth, zeros]

    def slope(self, class_weight: torch.Tensor | None, words: int) -> torch.Tensor:
        """``[T]``, the derivative of the sum by ``lse``, but for the square's."""
        return self.own if self.smooth is None else self.own + self.smooth * self._total(class_weight, words)

    def _total(self, class_weight: torch.Tensor | None, words: int) -> torch.Tensor | int:
        return words if class_weight is None else class_weight.to(self.own.dtype).sum()
