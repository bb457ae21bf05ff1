"""The gated activations that the fused kernels know, with their derivatives.

A gated expert computes ``act(gate) * up`` from one projection whose first half is ``gate`` and whose second half is
``up``. The formulas are those of Shazeer, *GLU Variants Improve Transformer* (2020).
"""

from __future__ import annotations

import torch

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")

_APPROXIMATE = {"gelu_tanh": "tanh", "gelu": "none"}


def apply(activation: str, gate: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``act(gate)``, elementwise, into ``out`` where given. ``activation`` is one of :data:`ACTIVATIONS`."""
    if activation == "silu":
        return torch.ops.aten.silu(gate) if out is None else torch.ops.aten.silu.out(gate, out=out)
    approximate = _APPROXIMATE[activation]
    if out is None:
        return torch.ops.aten.gelu(gate, approximate=approximate)
    return torch.ops.aten.gelu.out(gate, approximate=approximate, out=out)


def backward(activation: str, grad: torch.Tensor, gate: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``grad * act'(gate)``, elementwise, into ``out``. ``activation`` is one of :data:`ACTIVATIONS`."""
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=out)
    return torch.ops.aten.gelu_backward.grad_input(
        grad, gate, approximate=_APPROXIMATE[activation], grad_input=out
    )
