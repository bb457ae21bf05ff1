"""Native CPU implementation: the same passes as PyTorch's own operators, in the memory of the results alone.

In float16 a few rows at a time in float32, so that nothing of the size of the result is allocated beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..activation import act, act_backward
from .limits import LARGEST, LIMIT
from .tables import Table, find, look_up

# Elements of a chunk in float16: half a megabyte of float32, so that the passes over five of them meet in cache.
_CHUNK_ELEMENTS = 1 << 17
# Elements that are looked up at a time: as many as torch leaves to one thread, which needs to wait for no other.
_LOOKED_UP_ELEMENTS = 1 << 15


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See :func:`scattermoe_lora.ops.gated_activation.op.gated_activation_forward`."""
    out = gate.new_empty(gate.shape)
    table = find(activation, gate)
    if gate.dtype == torch.float16:
        for (g, u, y), buffers in _chunks(gate, up, out):
            product, *_ = _product(activation, table, g, u, buffers)
            y.copy_(product)
    elif table is None:
        # Of the whole tensor at once, as the model's own code: the last bits of a vectorized function depend on where
        # a chunk ends.
        act(activation, gate, out=out).mul_(up)
    else:
        for g, y in _flat_pieces(gate, out):
            look_up(table.values, g, out=y)
        out.mul_(up)
    return out


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.gated_activation.op.gated_activation_backward`."""
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    table = find(activation, gate)
    if gate.dtype == torch.float16:
        for (d, gate_rows, up_rows, *targets), buffers in _chunks(dy, gate, up, d_gate, d_up):
            product, value, g, u, clamped = _product(activation, table, gate_rows, up_rows, buffers)
            wide = product.copy_(d)
            d_value, d_factor = u.mul_(wide), value.mul_(wide)
            if table is None or clamped is not None:
                act_backward(activation, d_value, g, out=d_value)
            else:
                d_value.mul_(look_up(table.slopes, gate_rows, out=g))
            for target, gradient in zip(targets, (d_value, d_factor), strict=True):
                target.copy_(gradient if clamped is None else gradient.masked_fill_(clamped, 0.0))
        return d_gate, d_up
    torch.mul(dy, up, out=d_gate)
    if table is None:
        act(activation, gate, out=d_up).mul_(dy)
        act_backward(activation, d_gate, gate, out=d_gate)
        return d_gate, d_up
    slopes = gate.new_empty(_LOOKED_UP_ELEMENTS, dtype=torch.float32)
    for g, d, value in _flat_pieces(gate, d_gate, d_up):
        look_up(table.values, g, out=value)
        d.copy_(look_up(table.slopes, g, out=slopes[: g.shape[0]]).mul_(d))
    return d_gate, d_up.mul_(dy)


def _flat_pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same ``_LOOKED_UP_ELEMENTS`` of each of the contiguous tensors at a time."""
    return zip(*(t.view(-1).split(_LOOKED_UP_ELEMENTS) for t in tensors), strict=True)


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]]:
    """The same rows ``[m, I]`` of each of the tensors ``[*, I]``, about ``_CHUNK_ELEMENTS`` at a time, and four buffers
    of their shape in float32, which are the same for each chunk: fresh memory would cost more than what is computed."""
    if not tensors[0].numel():
        return
    columns = tensors[0].shape[-1]
    rows = [t.reshape(-1, columns).split(max(_CHUNK_ELEMENTS // columns, 1)) for t in tensors]
    buffers = tensors[0].new_empty((4, *rows[0][0].shape), dtype=torch.float32)
    for chunk in zip(*rows, strict=True):
        yield chunk, [buffer[: chunk[0].shape[0]] for buffer in buffers]


def _product(
    activation: str, table: Table | None, gate: torch.Tensor, up: torch.Tensor, buffers: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``act(gate) * up`` within its bounds, ``act(gate)``, ``gate`` and ``up`` in the four buffers; and which elements
    were clamped, None where none was."""
    product, value, g, u = buffers
    g.copy_(gate)
    u.copy_(up)
    if table is None:
        act(activation, g, out=value)
    else:
        look_up(table.values, gate, out=value)
    torch.mul(value, u, out=product)
    # Both are NaN if any element is: what is infinite is not finite in the product either.
    least, largest = product.aminmax()
    if least >= -LIMIT and largest <= LIMIT:
        return product, value, g, u, None
    act(activation, g.clamp_(-LARGEST, LARGEST), out=value)
    torch.mul(value, u.clamp_(-LARGEST, LARGEST), out=product)
    inside = (product.abs() <= LIMIT) & gate.isfinite() & up.isfinite()
    return product.clamp_(-LIMIT, LIMIT), value, g, u, inside.logical_not_()
