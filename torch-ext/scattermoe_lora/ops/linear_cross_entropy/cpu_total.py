"""Native CPU implementation of a sum of losses with its gradients: the logits of a block of tokens are kept.

The logits are read again when their log-sum-exp is known, instead of being multiplied again: three products of their
size in all where a head is trained.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from .arguments import Objective, Operands, Settings, Statistics
from .cpu import (
    Block,
    Labels,
    add_label_terms,
    add_products,
    blocks_of_words,
    forward_of_tokens,
    label_slopes,
    slices,
    tokens_of,
)

# Bytes of the logits that are kept: with LoRA on the head; with a trained head of the dtype in which its gradient is
# summed up; and with one whose sum is in float32 beside the gradient, by far the larger of the two. The sum is read and
# written for each block of tokens. A block has at least so many tokens, however large the vocabulary, since the head is
# read twice for it.
_LOGITS_BYTES, _TRAINED_BYTES, _SUMMED_BYTES = 13 << 21, 11 << 21, 1 << 26
_LEAST_TOKENS, _MOST_TOKENS = 64, 1024


def forward(
    operands: Operands, objective: Objective, settings: Settings, names: Collection[str]
) -> tuple[Statistics, dict[str, torch.Tensor]]:
    """See :func:`scattermoe_lora.ops.linear_cross_entropy.total.linear_cross_entropy_total`."""
    kept = operands.labels >= 0
    tokens, words = kept.shape[0], operands.weight.shape[0]
    if not bool(kept.all()):
        index = kept.nonzero().squeeze(1)
        results, gradients = forward(tokens_of(operands, index), objective.of(index), settings, names)

        def scattered(own: torch.Tensor) -> torch.Tensor:
            return own.new_zeros((tokens, *own.shape[1:])).index_copy_(0, index, own)

        shown = (True, True, settings.sums, settings.entropies)
        by_kept = [
            scattered(value) if is_asked else value for value, is_asked in zip(results, shown, strict=False)
        ]
        gradients |= {name: scattered(gradients[name]) for name in ("hidden", "low") if name in gradients}
        return Statistics._make((*by_kept, *results[len(shown) :])), gradients
    make = torch.empty_like if tokens else torch.zeros_like
    by_token, by_word = (
        {name: make(getattr(operands, name), dtype=operands.wide) for name in group if name in names}
        for group in (("hidden", "low"), ("weight", "bias", "b"))
    )
    kept_bytes = _LOGITS_BYTES
    if "weight" in names:
        kept_bytes = _TRAINED_BYTES if operands.weight.dtype == operands.wide else _SUMMED_BYTES
    size = min(max(kept_bytes // (words * operands.wide.itemsize), _LEAST_TOKENS), _MOST_TOKENS)
    pieces = []
    for rows in slices(tokens, size):
        some = tokens_of(operands, rows)
        own = {name: total[rows].zero_() for name, total in by_token.items()}
        pieces.append(_add_block(some, objective.of(rows), settings, own, by_word, is_first=rows.start == 0))
    pieces = pieces or [forward_of_tokens(operands, settings)]
    lse, label_logit, sums, entropy, _, pull = (torch.cat(column) for column in zip(*pieces, strict=True))
    sums, entropy = sums[: tokens * settings.sums], entropy[: tokens * settings.entropies]
    return Statistics(lse, label_logit, sums, entropy, lse.new_empty(0), pull), by_token | by_word


def _add_block(
    operands: Operands,
    objective: Objective,
    settings: Settings,
    by_token: dict[str, torch.Tensor],
    by_word: dict[str, torch.Tensor],
    is_first: bool,
) -> Statistics:
    """Adds a block of tokens' gradients to these sums; returns its statistics."""
    logits: list[torch.Tensor] = []
    statistics = forward_of_tokens(operands, settings, logits)
    words = operands.weight.shape[0]
    gradients = objective.gradients(statistics, operands.class_weight, words)
    settings = settings._replace(entropies=False)
    slopes = label_slopes(operands, settings, statistics, gradients)
    labels = Labels(operands.labels)
    for part, x in zip(blocks_of_words(operands), logits, strict=True):
        block = Block(operands, settings, part)
        d = block.gradient(x, statistics.lse, statistics.entropy, gradients)
        own = {name: total[part] for name, total in by_word.items()}
        add_products(d, labels.within(part), slopes, block, operands, by_token, own, is_first)
    add_label_terms(by_token, slopes, operands)
    return statistics
