"""The oracle: RMSNorm and rotary embedding as plain PyTorch, in the precision of its input."""

from __future__ import annotations

import torch


def rms_norm_rotary(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """See :func:`scattermoe_lora.ops.norm_rotary.api.rms_norm_rotary`; nothing is rounded in between."""
    n = x * (x.pow(2).mean(dim=-1, keepdim=True) + eps).pow(-0.5)
    if weight is not None:
        n = n * weight
    if cos is None or sin is None:
        return n
    rotated, rest = n.split((cos.shape[-1], n.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((rotated * cos.unsqueeze(2) + turned * sin.unsqueeze(2), rest), dim=-1)
