"""Mixture-of-experts layer with low-rank factors, as plainly as it can be written: the oracle of the fast paths."""

from __future__ import annotations

import torch

from .. import activation as act
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
    activation: str,
) -> torch.Tensor:
    """``sum_k w[t, k] * down(act(gate(x[t])) * up(x[t]))`` over the experts of each token.

    Args:
        hidden_states: ``[T, H]``.
        gate_up_proj: ``[E, 2I, H]``; rows ``[:I]`` are the gate.
        down_proj: ``[E, H, I]``.
        expert_index: ``[T, K]`` integers; ``>= E`` contributes nothing.
        routing_weights: ``[T, K]``.
        gate_up_lora_a, gate_up_lora_b: ``[E, r, H]`` and ``[E, 2I, r]``, the scaling already in ``b``, or None.
        down_lora_a, down_lora_b: ``[E, r, I]`` and ``[E, H, r]``, or None.
        activation: One of :data:`scattermoe_lora.ops.activation.ACTIVATIONS`.

    Returns:
        ``[T, H]``. Differentiable by autograd in every floating-point argument.
    """
    gate_up = grouped_linear(hidden_states, gate_up_proj, expert_index, gate_up_lora_a, gate_up_lora_b)
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = act.apply(activation, gate) * up
    out = grouped_linear(hidden, down_proj, expert_index, down_lora_a, down_lora_b)
    here = (expert_index < down_proj.shape[0]).unsqueeze(-1)
    return (out * (routing_weights.unsqueeze(-1) * here)).sum(dim=1)
