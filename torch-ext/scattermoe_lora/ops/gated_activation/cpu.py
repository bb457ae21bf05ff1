"""Native CPU implementation: the same passes as PyTorch's own operators, in the memory of the results alone.

In float16 a few rows at a time in float32, so that nothing of the size of the result is allocated beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..activation import act, act_backward
from .limits import LARGEST, LIMIT

# Elements of a chunk: 2 MB of float32, so that its passes meet it in cache.
_CHUNK_ELEMENTS = 1 << 19


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See :func:`scattermoe_lora.ops.gated_activation.op.gated_activation_forward`."""
    out = gate.new_empty(gate.shape)
    if gate.dtype != torch.float16:
        # Of the whole tensor at once, as the model's own code: the last bits of a vectorized function depend on where
        # a chunk ends.
        return act(activation, gate, out=out).mul_(up)
    for rows, part in zip(_chunks(gate, up), _chunks(out), strict=True):
        product, *_ = _product(activation, *rows)
        part[0].copy_(product.clamp_(-LIMIT, LIMIT))
    return out


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.gated_activation.op.gated_activation_backward`."""
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if gate.dtype != torch.float16:
        act(activation, gate, out=d_up).mul_(dy)
        act_backward(activation, torch.mul(dy, up, out=d_gate), gate, out=d_gate)
        return d_gate, d_up
    for (dy_rows, *rows), (d_gate_rows, d_up_rows) in zip(
        _chunks(dy, gate, up), _chunks(d_gate, d_up), strict=True
    ):
        product, value, g, u = _product(activation, *rows)
        stopped = (product.abs_() <= LIMIT).logical_not_()
        for t in rows:
            stopped |= t.isfinite().logical_not_()
        wide = dy_rows.float()
        d_up_rows.copy_(value.mul_(wide).masked_fill_(stopped, 0.0))
        act_backward(activation, u.mul_(wide), g, out=u)
        d_gate_rows.copy_(u.masked_fill_(stopped, 0.0))
    return d_gate, d_up


def _chunks(*tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The same rows ``[m, I]`` of each of the tensors ``[*, I]``, about ``_CHUNK_ELEMENTS`` at a time."""
    if not tensors[0].numel():
        return
    rows = [t.reshape(-1, t.shape[-1]) for t in tensors]
    yield from map(list, zip(*(t.split(max(_CHUNK_ELEMENTS // t.shape[1], 1)) for t in rows), strict=True))


def _product(
    activation: str, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``act(gate) * up``, ``act(gate)``, ``gate`` and ``up`` in float32, of finite arguments."""
    g, u = (t.float().clamp_(-LARGEST, LARGEST) for t in (gate, up))
    value = act(activation, g)
    return value * u, value, g, u
