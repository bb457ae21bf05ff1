"""Projections with low-rank adapters as plainly as they can be written: the oracle of the fast path."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def lora_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    adapters: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor, float]]],
    biases: Sequence[torch.Tensor | None],
    masks: Sequence[Sequence[torch.Tensor | float]] | None = None,
) -> list[torch.Tensor]:
    """``y_p = x W_p^T + b_p + sum_i s_i (mask_i x) A_i^T B_i^T`` for each projection ``p``.

    Args:
        x: ``[T, N_in]``.
        weights: ``[N_p, N_in]`` each.
        adapters: For each projection its ``(A [r, N_in], B [N_p, r], scaling)``.
        biases: ``[N_p]`` or None each.
        masks: For each projection and adapter what ``x`` is multiplied with before A, 1/(1-p) in it. None for 1.
    """
    results = []
    for p, weight in enumerate(weights):
        y = x @ weight.t()
        bias = biases[p]
        if bias is not None:
            y = y + bias
        for i, (a, b, scaling) in enumerate(adapters[p]):
            rows = x if masks is None else x * masks[p][i]
            y = y + (rows @ a.t() @ b.t()) * scaling
        results.append(y)
    return results
