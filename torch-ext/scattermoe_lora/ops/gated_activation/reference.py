"""The oracle: a gated activation as plain PyTorch, in the precision of its input."""

from __future__ import annotations

import torch

from .. import activation


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """``act(gate) * up``; see :func:`scattermoe_lora.ops.gated_activation.api.gated_activation`."""
    return activation.act(kind, gate) * up
