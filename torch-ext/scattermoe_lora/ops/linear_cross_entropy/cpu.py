"""Native CPU implementation: a block of tokens by a block of the vocabulary at a time, while it is in cache.

Sums over a row of logits are taken online, as in Milakov & Gimelshein, *Online normalizer calculation for softmax*
(2018). The backward multiplies a block's logits again, unless the forward could sum up the derivative: then the rows of
the weight stand where attention has its values, and nothing is left to multiply.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from ..cpu_matmul import linear
from .arguments import Operands, Settings, Statistics, StatisticsGradients

# A block's logits are 4 MB of float32. Of few tokens it has up to four times as many words, where they are few of all.
_TOKENS, _VOCABULARY = 1024, 1024
# With so few tokens to sum over, the gradient of the head is bound by memory.
_FEW_TOKENS = 128


def slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def blocks_of_words(operands: Operands) -> Iterator[slice]:
    tokens, words = operands.hidden.shape[0], operands.weight.shape[0]
    factor = min(4, _TOKENS // max(tokens, 1), words // (16 * _VOCABULARY))
    return slices(words, max(factor, 1) * _VOCABULARY)


def tokens_of(operands: Operands, tokens: slice | torch.Tensor) -> Operands:
    low = operands.low
    return operands._replace(
        hidden=operands.hidden[tokens],
        low=None if low is None else low[tokens],
        labels=operands.labels[tokens],
    )


class Block:
    """The head's rows for a part of the vocabulary, and the tokens whose labels are in it."""

    def __init__(self, operands: Operands, settings: Settings, part: slice) -> None:
        wide = operands.wide
        self._wide, self._settings = wide, settings
        self.weight = operands.weight[part].to(operands.hidden.dtype)
        self._bias = None if operands.bias is None else operands.bias[part].to(wide)
        self.b = None if operands.b is None else operands.b[part].to(wide)
        self.class_weight = None if operands.class_weight is None else operands.class_weight[part].to(wide)

    def logits(self, operands: Operands) -> torch.Tensor:
        """``[T, n]`` of the tokens of ``operands``, float32 (float64 for float64)."""
        x = linear(operands.hidden, self.weight).to(self._wide)
        if operands.low is not None and self.b is not None:
            x.addmm_(operands.low.to(self._wide), self.b.t())
        if self._bias is not None:
            x.add_(self._bias)
        scale, softcap, *_ = self._settings
        if softcap:
            return x.mul_(scale / softcap).tanh_().mul_(softcap)
        return x if scale == 1 else x.mul_(scale)

    def slopes(self, x: torch.Tensor) -> torch.Tensor | None:
        """Derivative of :meth:`logits` ``x`` by what the soft cap took, without the scale; None for 1."""
        softcap = self._settings.softcap
        return (x / softcap).square_().neg_().add_(1) if softcap else None

    def gradient(
        self, x: torch.Tensor, lse: torch.Tensor, entropy: torch.Tensor, gradients: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """``[T, n]``, the gradient of :meth:`logits` ``x`` before scale and soft cap; labels as if they were none.

        Args:
            x: Overwritten.
            lse, entropy: As in :class:`Statistics`.
            gradients: ``[T]``, of the first four statistics.
        """
        d_lse, _, d_sum, d_entropy = (part.unsqueeze(1) * self._settings.scale for part in gradients)
        slopes = self.slopes(x)
        x.sub_(lse.unsqueeze(1))
        if self._settings.entropies:
            p = x.exp()
            terms = x.add_(entropy.unsqueeze(1)).mul_(d_entropy).masked_fill_(p == 0, 0.0)
            d = p.mul_(d_lse - terms)
        else:
            d = x.exp_().mul_(d_lse)
        if self._settings.sums:
            d.add_(d_sum if self.class_weight is None else d_sum * self.class_weight)
        return d if slopes is None else d.mul_(slopes)


class Labels:
    """Tokens sorted by label: a part of the vocabulary finds those that have their label in it."""

    def __init__(self, labels: torch.Tensor) -> None:
        self._labels, self._tokens = labels.sort(stable=True)

    def within(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, and the columns of the part that are their labels."""
        bounds = self._labels.new_tensor([part.start, part.stop])
        first, last = torch.searchsorted(self._labels, bounds).tolist()
        return self._tokens[first:last], self._labels[first:last] - part.start


def forward(operands: Operands, settings: Settings) -> Statistics:
    """See :func:`scattermoe_lora.ops.linear_cross_entropy.op.linear_cross_entropy_forward`."""
    hidden, wide = operands.hidden, operands.wide
    tokens = hidden.shape[0]

    def zeros(asked: bool, *width: int, dtype: torch.dtype = wide) -> torch.Tensor:
        return hidden.new_zeros((tokens if asked else 0, *width), dtype=dtype)

    result = Statistics(
        zeros(True),
        zeros(True),
        zeros(settings.sums),
        zeros(settings.entropies),
        zeros(settings.peaks),
        zeros(settings.pulls, hidden.shape[1], dtype=hidden.dtype),
    )
    kept = operands.labels >= 0
    # Tokens without a label cost nothing: those that have one are gathered.
    index = None if bool(kept.all()) else kept.nonzero().squeeze(1)
    for part in slices(tokens if index is None else index.shape[0], _TOKENS):
        rows = part if index is None else index[part]
        block = forward_of_tokens(tokens_of(operands, rows), settings)
        for total, value in zip(result, block, strict=True):
            if total.shape[0]:
                total[rows] = value
    return result


def forward_of_tokens(
    operands: Operands, settings: Settings, logits: list[torch.Tensor] | None = None
) -> Statistics:
    """Statistics of tokens that all have a label; appends their logits, a block each, to ``logits``."""
    hidden, wide, labels = operands.hidden, operands.wide, Labels(operands.labels)
    tokens = hidden.shape[0]
    # Finite, so that a block of logits of -inf, by which a bias leaves words out, changes nothing.
    peak = hidden.new_full((tokens,), torch.finfo(wide).min, dtype=wide)
    total, weighted, sums = (torch.zeros_like(peak) for _ in range(3))
    # A label outside the vocabulary is found nowhere.
    label_logit = torch.full_like(peak, torch.nan)
    pull = hidden.new_zeros(hidden.shape if settings.pulls else (0, 0), dtype=wide)
    for part in blocks_of_words(operands):
        block = Block(operands, settings, part)
        x = block.logits(operands)
        own, columns = labels.within(part)
        label_logit[own] = x[own, columns]
        if settings.sums:
            sums += x.sum(dim=1) if block.class_weight is None else x.mv(block.class_weight)
        slopes = block.slopes(x) if settings.pulls else None
        before = peak
        peak = torch.maximum(before, x.amax(dim=1))
        ratio = before.sub_(peak).exp_()
        if logits is not None:
            logits.append(x)
            x = x.clone()
        plain = x.clone() if settings.entropies else None
        p = x.sub_(peak.unsqueeze(1)).exp_()
        total.mul_(ratio).add_(p.sum(dim=1))
        if plain is not None:
            # A word of probability 0 adds nothing, also where its logit is -inf.
            terms = plain.mul_(p).masked_fill_(p == 0, 0.0)
            weighted.mul_(ratio).add_(terms.sum(dim=1))
        if settings.pulls:
            # The label's term nearly cancels what it is subtracted from; it is added in full precision, later.
            p[own, columns] = 0
            p = p if slopes is None else p.mul_(slopes)
            pull.mul_(ratio.unsqueeze(1)).add_(linear(p.to(hidden.dtype), block.weight.t()))
    lse = total.log().add_(peak)
    entropy = lse - weighted / total
    if settings.pulls:
        pull.mul_((settings.scale / total).unsqueeze(1))
    return Statistics(lse, label_logit, sums, entropy, peak, pull.to(hidden.dtype))


def _inside(operands: Operands) -> torch.Tensor:
    """The labels; a word of the vocabulary for those outside of it, whose loss is NaN whatever stands there."""
    return operands.labels.clamp(max=operands.weight.shape[0] - 1)


def label_slopes(
    operands: Operands, settings: Settings, statistics: Statistics, gradients: list[torch.Tensor]
) -> torch.Tensor:
    """``[T]``, the gradient of the label's logit before scale and soft cap."""
    lse, label_logit, entropy = statistics.lse, statistics.label_logit, statistics.entropy
    d_lse, d_label, d_sum, d_entropy = gradients
    log_p = label_logit - lse
    slope = log_p.exp() * d_lse + d_label
    if settings.entropies:
        slope -= log_p.exp() * (log_p + entropy) * d_entropy
    if settings.sums:
        class_weight = operands.class_weight
        slope += d_sum if class_weight is None else d_sum * class_weight.to(slope.dtype)[_inside(operands)]
    if settings.softcap:
        slope *= 1 - (label_logit / settings.softcap).square()
    return slope * settings.scale


def backward(
    gradients: StatisticsGradients,
    operands: Operands,
    statistics: Statistics,
    settings: Settings,
    names: Collection[str],
) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.linear_cross_entropy.op.linear_cross_entropy_backward`."""
    parts = gradients.or_zeros(statistics.lse)
    kept = operands.labels >= 0
    if bool(kept.all()):
        return _backward(parts, operands, statistics, settings, names)
    index = kept.nonzero().squeeze(1)
    chosen = Statistics(*(each[index] if each.shape[0] else each for each in statistics))
    result = _backward([part[index] for part in parts], tokens_of(operands, index), chosen, settings, names)
    for name in ("hidden", "low"):
        if name in result:
            own = result[name]
            result[name] = own.new_zeros(kept.shape[0], own.shape[1]).index_copy_(0, index, own)
    return result


def _backward(
    gradients: list[torch.Tensor],
    operands: Operands,
    statistics: Statistics,
    settings: Settings,
    names: Collection[str],
) -> dict[str, torch.Tensor]:
    hidden, wide, labels = operands.hidden, operands.wide, operands.labels
    tokens = hidden.shape[0]
    slopes = label_slopes(operands, settings, statistics, gradients)
    by_token: dict[str, torch.Tensor] = {}
    if statistics.pull.shape[0]:
        by_token["hidden"] = statistics.pull * gradients[0].unsqueeze(1)
    else:
        for name in ("hidden", "low"):
            if name in names:
                by_token[name] = hidden.new_zeros(getattr(operands, name).shape, dtype=wide)
    by_word = {
        name: torch.empty_like(getattr(operands, name)) for name in ("weight", "bias", "b") if name in names
    }
    sorted_labels = Labels(labels)
    for part in blocks_of_words(operands):
        if statistics.pull.shape[0] or not tokens:
            break
        block = Block(operands, settings, part)
        own, columns = sorted_labels.within(part)
        sums = {name: total[part].to(wide) for name, total in by_word.items()}
        for rows in slices(tokens, _TOKENS):
            some = tokens_of(operands, rows)
            own_gradients = [gradient[rows] for gradient in gradients]
            x = block.logits(some)
            d = block.gradient(x, statistics.lse[rows], statistics.entropy[rows], own_gradients)
            here = (own >= rows.start) & (own < rows.stop)
            own_here = own[here] - rows.start, columns[here]
            add_products(
                d, own_here, slopes[rows], block, some,
                {name: total[rows] for name, total in by_token.items()}, sums, is_first=rows.start == 0,
            )  # fmt: skip
        for name, total in sums.items():
            if by_word[name].dtype != wide:
                by_word[name][part] = total
    if not tokens:
        by_word = {name: torch.zeros_like(total) for name, total in by_word.items()}
    add_label_terms(by_token, slopes, operands)
    return by_word | {name: total.to(getattr(operands, name).dtype) for name, total in by_token.items()}


def add_products(
    d: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor],
    slopes: torch.Tensor,
    block: Block,
    operands: Operands,
    by_token: dict[str, torch.Tensor],
    by_word: dict[str, torch.Tensor],
    is_first: bool,
) -> None:
    """Adds what some tokens' gradient ``d`` ``[T, n]`` of a block's logits gives to the sums of the tokens and words.

    Args:
        d: As of :meth:`Block.gradient`; overwritten.
        own: Tokens whose label is in the block, and its column.
        slopes: ``[T]``, the gradient of the label's logit. It is not multiplied with what is rounded. The tokens' sums
            are left to :func:`add_label_terms`.
        block, operands: The block, and the tokens' operands.
        by_token, by_word: Sums for the tokens and for the block's words.
        is_first: Whether nothing has been added to ``by_word`` yet, whose values are then ignored.
    """
    tokens, columns = own
    d[tokens, columns] = 0
    rounded = d.to(operands.hidden.dtype)
    if "hidden" in by_token:
        by_token["hidden"].add_(linear(rounded, block.weight.t()))
    if "low" in by_token and block.b is not None:
        by_token["low"].addmm_(d, block.b)
    for name, total in by_word.items():
        if name == "weight" and rounded.dtype == total.dtype and d.shape[0] <= _FEW_TOKENS:
            total.addmm_(d.t(), operands.hidden, beta=0 if is_first else 1)
        elif is_first:
            total.copy_(_share(name, d, rounded, operands))
        else:
            total.add_(_share(name, d, rounded, operands))
        terms = slopes[tokens]
        if name != "bias":
            factor = operands.hidden if name == "weight" else operands.low
            assert factor is not None
            terms = terms.unsqueeze(1) * factor[tokens].to(total.dtype)
        total.index_add_(0, columns, terms)


def add_label_terms(by_token: dict[str, torch.Tensor], slopes: torch.Tensor, operands: Operands) -> None:
    """Adds to the tokens' sums the label's row of what their logits are products with, times ``slopes`` ``[T]``."""
    dtype = operands.hidden.dtype
    for name, total in by_token.items():
        of_label = operands.weight if name == "hidden" else operands.b
        assert of_label is not None
        for rows in slices(total.shape[0], _TOKENS):
            chosen = of_label[_inside(operands)[rows]].to(dtype).to(total.dtype)
            total[rows].addcmul_(chosen, slopes[rows].unsqueeze(1))


def _share(name: str, d: torch.Tensor, rounded: torch.Tensor, operands: Operands) -> torch.Tensor:
    """What some tokens add to the gradient of a block's ``weight``, ``bias`` or ``b``."""
    if name == "bias":
        return d.sum(dim=0)
    if name == "weight":
        return linear(rounded.t(), operands.hidden.t())
    assert operands.low is not None
    return d.t() @ operands.low.to(d.dtype)
