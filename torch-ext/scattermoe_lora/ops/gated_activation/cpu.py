"""Native CPU implementation: the same passes as PyTorch's own operators, in the memory of the results alone.

In float16 a few rows at a time in float32, so that nothing of the size of the result is allocated beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..activation import act, act_backward
from .limits import LARGEST, LIMIT

# Elements of a chunk: half a megabyte of float32, so that the passes over five of them meet in cache.
_CHUNK_ELEMENTS = 1 << 17


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See :func:`scattermoe_lora.ops.gated_activation.op.gated_activation_forward`."""
    out = gate.new_empty(gate.shape)
    if gate.dtype != torch.float16:
        # Of the whole tensor at once, as the model's own code: the last bits of a vectorized function depend on where
        # a chunk ends.
        return act(activation, gate, out=out).mul_(up)
    for rows, (part,) in zip(_chunks(gate, up), _chunks(out), strict=True):
        product, *_ = _product(activation, *rows)
        part.copy_(product)
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
        _, value, g, u, clamped = _product(activation, *rows)
        wide = dy_rows.float()
        d_value, d_factor = u.mul_(wide), value.mul_(wide)
        act_backward(activation, d_value, g, out=d_value)
        for target, gradient in ((d_gate_rows, d_value), (d_up_rows, d_factor)):
            target.copy_(gradient if clamped is None else gradient.masked_fill_(clamped, 0.0))
    return d_gate, d_up


def _chunks(*tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The same rows ``[m, I]`` of each of the tensors ``[*, I]``, about ``_CHUNK_ELEMENTS`` at a time."""
    if not tensors[0].numel():
        return
    rows = [t.reshape(-1, t.shape[-1]) for t in tensors]
    yield from map(list, zip(*(t.split(max(_CHUNK_ELEMENTS // t.shape[1], 1)) for t in rows), strict=True))


def _product(
    activation: str, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``act(gate) * up`` within its bounds, ``act(gate)``, ``gate`` and ``up`` in float32; and which elements were
    clamped, None where none was."""
    g, u = gate.float(), up.float()
    value = act(activation, g)
    product = value * u
    # The largest of all, which is NaN if any is: what is infinite is not finite in the product either.
    if product.abs().amax() <= LIMIT:
        return product, value, g, u, None
    value = act(activation, g.clamp_(-LARGEST, LARGEST))
    product = value * u.clamp_(-LARGEST, LARGEST)
    inside = (product.abs() <= LIMIT) & gate.isfinite() & up.isfinite()
    return product.clamp_(-LIMIT, LIMIT), value, g, u, inside.logical_not_()
