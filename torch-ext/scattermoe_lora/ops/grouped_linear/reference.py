"""Per-expert linear over routed tokens, as plainly as it can be written: the oracle of the fast paths."""

from __future__ import annotations

import torch


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    expert_index: torch.Tensor,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[t, k] = (W[e] + B[e] A[e]) x[t] + bias[e]`` (or ``x[t, k]``) with ``e = expert_index[t, k]``.

    Args:
        x: ``[T, N_in]``, or ``[T, K, N_in]`` where each pair has a row of its own.
        weight: ``[E, N_out, N_in]``.
        expert_index: ``[T, K]`` integers; ``>= E`` gives zeros.
        lora_a, lora_b: ``[E, r, N_in]`` and ``[E, N_out, r]``, the scaling already in ``b``, or None.
        bias: ``[E, N_out]`` or None.

    Returns:
        ``[T, K, N_out]``.
    """
    num_experts = weight.shape[0]
    is_local = expert_index < num_experts
    expert = expert_index.clamp(max=num_experts - 1)
    effective = weight if lora_a is None or lora_b is None else weight + lora_b @ lora_a
    if x.dim() == 2:
        x = x.unsqueeze(1).expand(-1, expert_index.shape[1], -1)
    y = torch.einsum("tki,tkoi->tko", x, effective[expert])
    if bias is not None:
        y = y + bias[expert]
    return y * is_local.unsqueeze(-1)
