"""The oracle: RMSNorm as plain PyTorch, in the precision of its input."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.rms_norm.api.add_rms_norm`; nothing is rounded in between."""
    total = x if residual is None else x + residual
    n = total * (total.pow(2).mean(dim=-1, keepdim=True) + eps).pow(-0.5)
    return n if weight is None else n * (weight + offset), total
