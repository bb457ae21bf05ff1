"""The gates that the fused kernels know, with their derivatives.

A gated expert splits one projection into ``gate`` and ``up`` and computes
``act(min(gate, limit)) * (clamp(up) + shift)``. Without limit and shift these are the gated linear units of Shazeer,
*GLU Variants Improve Transformer* (2020); with both, and ``alpha`` 1.702, the gate of gpt-oss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")

_APPROXIMATE = {"gelu_tanh": "tanh", "gelu": "none"}


class Gate(NamedTuple):
    """``act(min(gate, limit)) * (clamp(up, -limit, limit) + shift)`` of a projection ``h`` ``[*, 2I]``.

    Attributes:
        activation: One of :data:`ACTIVATIONS`.
        interleaved: ``h`` holds ``gate_0, up_0, gate_1, ...`` instead of all of gate, then all of up.
        alpha: ``silu`` is ``x * sigmoid(alpha * x)``; the others do not use it.
        limit: Bound of ``gate`` from above and of ``up`` on both sides.
        shift: Added to ``up``.
    """

    activation: str
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = math.inf
    shift: float = 0.0

    @property
    def plain(self) -> bool:
        """True if this is ``act(gate) * up`` and no more."""
        return self.alpha == 1.0 and self.limit == math.inf and self.shift == 0.0

    def split(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of ``h`` ``[*, 2I]``: gate and up, ``[*, I]`` each."""
        if self.interleaved:
            return h[..., ::2], h[..., 1::2]
        gate, up = h.chunk(2, dim=-1)
        return gate, up


def act(activation: str, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The activation function, elementwise, into ``out`` where given."""
    if activation == "silu":
        return torch.ops.aten.silu(x) if out is None else torch.ops.aten.silu.out(x, out=out)
    approximate = _APPROXIMATE[activation]
    if out is None:
        return torch.ops.aten.gelu(x, approximate=approximate)
    return torch.ops.aten.gelu.out(x, approximate=approximate, out=out)


def act_backward(activation: str, grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``grad * act'(x)``, elementwise, into ``out``."""
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    return torch.ops.aten.gelu_backward.grad_input(
        grad, x, approximate=_APPROXIMATE[activation], grad_input=out
    )


def _wide(t: torch.Tensor) -> torch.Tensor:
    # Several roundings in a row would add up to more than the one that a fused kernel makes.
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def apply(gate: Gate, h: torch.Tensor) -> torch.Tensor:
    """The gated activation of ``h`` ``[*, 2I]``, ``[*, I]``; differentiable by autograd."""
    g, u = (_wide(t) for t in gate.split(h))
    value = act(gate.activation, gate.alpha * g.clamp(max=gate.limit)) / gate.alpha
    return (value * (u.clamp(-gate.limit, gate.limit) + gate.shift)).to(h.dtype)


def forward(gate: Gate, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The gated activation of ``h`` ``[m, 2I]`` into ``out`` ``[m, I]``."""
    if not gate.plain:
        return out.copy_(apply(gate, h))
    g, u = gate.split(h)
    return act(gate.activation, g, out=out).mul_(u)


def backward(
    gate: Gate,
    da: torch.Tensor,
    h: torch.Tensor,
    value: torch.Tensor,
    dh: torch.Tensor,
) -> torch.Tensor:
    """The gradient of ``h`` into ``dh``.

    Args:
        da: ``[m, I]``, the gradient of the gated activation; overwritten.
        h: ``[m, 2I]``.
        value: ``[m, I]``, the second result of :func:`recompute`.
        dh: ``[m, 2I]``, where the result goes.
    """
    g, u = gate.split(h)
    dg, du = gate.split(dh)
    if gate.plain:
        torch.mul(da, value, out=du)
        act_backward(gate.activation, da.mul_(u), g, out=dg)
        return dh
    g, u, wide = _wide(g), _wide(u), _wide(da)
    # A NaN is within no bounds, and a clamp lets no gradient through to it; without bounds there is no clamp.
    clamped = gate.limit < math.inf
    d_up = wide * value
    du.copy_(d_up.masked_fill_((u.abs() <= gate.limit).logical_not_(), 0.0) if clamped else d_up)
    grad = wide * (u.clamp(-gate.limit, gate.limit) + gate.shift)
    slope = act_backward(gate.activation, grad, gate.alpha * g.clamp(max=gate.limit), torch.empty_like(grad))
    dg.copy_(slope.masked_fill_((g <= gate.limit).logical_not_(), 0.0) if clamped else slope)
    return dh


def recompute(
    gate: Gate, h: torch.Tensor, out: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated activation of ``h`` again, for the backward.

    Args:
        h: ``[m, 2I]``.
        out, value: ``[m, I]`` buffers.

    Returns:
        The gated activation, in ``out``; and ``act(min(gate, limit))``, which :func:`backward` takes.
    """
    g, u = gate.split(h)
    if gate.plain:
        act(gate.activation, g, out=value)
        return torch.mul(value, u, out=out), value
    wide = act(gate.activation, gate.alpha * _wide(g).clamp(max=gate.limit)).div_(gate.alpha)
    out.copy_(wide * (_wide(u).clamp(-gate.limit, gate.limit) + gate.shift))
    return out, wide
