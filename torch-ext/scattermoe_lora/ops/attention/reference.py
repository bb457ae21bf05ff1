"""Attention in plain PyTorch: the oracle of the tests."""

from __future__ import annotations

import torch

from .window import Window


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window, softcap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(cap(scale * q k^T) + mask) v`` with every score in memory, of one sequence.

    Args:
        q: ``[Sq, Hq, D]``.
        k, v: ``[Sk, Hkv, D]``; query head h reads key head ``h // (Hq / Hkv)``.
        scale: Factor of the scores.
        window: Which keys a query sees.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: they stay.

    Returns:
        ``[Sq, Hq, D]`` and the log-sum-exp of the scores, ``[Hq, Sq]``. A query that sees no key gets zeros and -inf.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    diagonal = torch.arange(q.shape[0], device=q.device)[:, None] + k.shape[0] - q.shape[0]
    distance = torch.arange(k.shape[0], device=q.device)[None, :] - diagonal
    sees = torch.ones_like(distance, dtype=torch.bool)
    if window.left >= 0:
        sees &= distance >= -window.left
    if window.right >= 0:
        sees &= distance <= window.right
    scores = scores.masked_fill(~sees, -torch.inf)
    blind = ~sees.any(dim=1)
    # Softmax of nothing is NaN, in its gradient too, where the scores themselves are not finite numbers.
    weights = scores.masked_fill(blind[:, None], 0.0).softmax(dim=-1).masked_fill(blind[:, None], 0.0)
    lse = scores.masked_fill(blind[:, None], 0.0).logsumexp(dim=-1).masked_fill(blind, -torch.inf)
    return torch.einsum("hqk,khd->qhd", weights, v), lse
