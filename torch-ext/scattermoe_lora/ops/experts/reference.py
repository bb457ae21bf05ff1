"""Mixture-of-experts layer with low-rank factors, as plainly as it can be written: the oracle of the fast paths."""

from __future__ import annotations

import torch

from .. import activation
from ..activation import Gate
from ..grouped_linear.reference import grouped_linear


def experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    expert_index: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up_lora_a: torch.Tensor | None,
    gate_up_lora_b: torch.Tensor | None,
    down_lora_a: torch.Tensor | None,
    down_lora_b: torch.Tensor | None,
    gate: Gate,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sum_k w[t, k] * down(gate(gate_up(x[t])))`` over the experts of each token.

    Args:
        hidden_states: ``[T, H]``.
        gate_up_proj: ``[E, 2I, H]``.
        down_proj: ``[E, H, I]``.
        expert_index: ``[T, K]`` integers; ``>= E`` contributes nothing.
        routing_weights: ``[T, K]``.
        gate_up_lora_a, gate_up_lora_b: ``[E, r, H]`` and ``[E, 2I, r]``, the scaling already in ``b``, or None.
        down_lora_a, down_lora_b: ``[E, r, I]`` and ``[E, H, r]``, or None.
        gate: The gated activation.
        gate_up_bias, down_bias: ``[E, 2I]`` and ``[E, H]``, or None.

    Returns:
        ``[T, H]``. Differentiable by autograd in every floating-point argument.
    """
    h = grouped_linear(
        hidden_states, gate_up_proj, expert_index, gate_up_lora_a, gate_up_lora_b, gate_up_bias
    )
    hidden = activation.apply(gate, h)
    out = grouped_linear(hidden, down_proj, expert_index, down_lora_a, down_lora_b, down_bias)
    is_local = (expert_index < down_proj.shape[0]).unsqueeze(-1)
    return (out * (routing_weights.unsqueeze(-1) * is_local)).sum(dim=1)
