"""Native CPU implementation: a few experts at a time, their whole chain while their rows are in cache.

Nothing of size ``S x H`` is allocated unless one expert has all rows: rows are gathered for the experts at hand and
summed straight into the output, and the backward recomputes the activation from the gate/up projection, the one large
intermediate that the forward keeps.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from .. import activation
from ..activation import Gate
from ..cpu_blocks import split
from ..grouped_linear.cpu import (
    Projection,
    accumulator,
    outer,
    per_expert,
    sum_rows,
    transposed,
    wide_dtype,
)
from .arguments import Kept, Operands

# Operands with a part for each expert.
_PER_EXPERT = (*Operands._fields[1:3], *Operands._fields[4:10])


def forward(
    operands: Operands, gate: Gate, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.experts.op.experts_forward`."""
    x, gate_up, down, weights, a1, b1, a2, b2, bias1, bias2, order, offsets = operands
    widths = (2 * down.shape[2], *operands.ranks)
    order, blocks = split(order, offsets, max(x.shape[1], widths[0]) * x.element_size())
    tokens = order // weights.shape[1]
    out = accumulator(x.shape, x)
    pair_weights = weights.reshape(-1)[order].to(out.dtype).unsqueeze(-1)
    kept = Kept(*(x.new_empty((order.shape[0] if keep else 0, n)) for n in widths))
    # Rows of pairs without an expert here are never read again, but equal calls must return equal bits.
    for saved in kept if keep else ():
        saved[blocks[-1].positions.stop if blocks else 0 :].zero_()

    most = max((block.size for block in blocks), default=0)
    x_buffer, h_buffer, low1_buffer, low2_buffer, a_buffer = (
        x.new_empty((most, n)) for n in (x.shape[1], *widths, down.shape[2])
    )
    up_map, down_map = Projection(gate_up, a1, b1, bias1), Projection(down, a2, b2, bias2)
    for block in blocks:
        rows = block.gather(x, tokens, x_buffer)
        low1 = up_map.low(block, rows, low1_buffer)
        h = up_map.apply(block, rows, low1, h_buffer)
        a = activation.forward(gate, h, out=a_buffer[: block.size])
        low2 = down_map.low(block, a, low2_buffer)
        # The output takes the place of the rows, which have served.
        y = block.own(down_map.apply(block, a, low2, x_buffer)).to(out.dtype)
        out.index_add_(0, tokens[block.positions], y.mul_(pair_weights[block.positions]))
        if keep:
            for saved, values in zip(kept, (h, low1, low2), strict=True):
                block.own(values, out=saved[block.positions])
    return out.to(x.dtype), *kept


def backward(
    grad_out: torch.Tensor, operands: Operands, kept: Kept, gate: Gate, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.experts.op.experts_backward`; ``names`` are the operands that need one."""
    x, gate_up, down, weights, a1, b1, a2, b2, _, bias2, order, offsets = operands
    widths = (2 * down.shape[2], *operands.ranks)
    order, blocks = split(order, offsets, max(x.shape[1], widths[0]) * x.element_size())
    tokens, positions = order // weights.shape[1], torch.arange(order.shape[0])
    wide = wide_dtype(x)
    pair_weights = weights.reshape(-1)[order].to(wide).unsqueeze(-1)

    dx = accumulator(x.shape, x) if "x" in names else None
    d_weights = torch.zeros(order.shape, dtype=wide) if "routing_weights" in names else None
    gradients = {
        name: per_expert(getattr(operands, name), blocks)
        for name in names
        if name not in ("x", "routing_weights")
    }
    d_gate_up, d_down, da1, db1, da2, db2, d_bias1, d_bias2 = map(gradients.get, _PER_EXPERT)
    need_gate_up_side = any(d is not None for d in (dx, d_gate_up, da1, db1, d_bias1))

    most = max((block.size for block in blocks), default=0)
    row_buffer, h_buffer, low1_buffer, low2_buffer, dh_buffer, du1_buffer, du2_buffer = (
        x.new_empty((most, n)) for n in (x.shape[1], *widths, *widths)
    )
    value_buffer, a_buffer, da_buffer = (x.new_empty((most, down.shape[2])) for _ in range(3))
    w_buffer = pair_weights.new_empty((most, 1))
    reverse_up = Projection(gate_up.mT, transposed(b1), transposed(a1))
    reverse_down = Projection(down.mT, transposed(b2), transposed(a2))
    for block in blocks:
        w = block.gather(pair_weights, positions, w_buffer)
        h, low1, low2 = (
            block.gather(saved, positions, buffer)
            for saved, buffer in zip(kept, (h_buffer, low1_buffer, low2_buffer), strict=True)
        )
        dy = block.gather(grad_out, tokens, row_buffer)
        n = block.size
        a, value = activation.recompute(gate, h, out=a_buffer[:n], value=value_buffer[:n])

        # The gradient before the routing weight comes first: <dy, down(a)> = <da, a> + <dy, bias> is then the routing
        # weight's own gradient, without keeping down(a).
        du2 = reverse_down.low(block, dy, du2_buffer)
        da = reverse_down.apply(block, dy, du2, da_buffer)
        if d_weights is not None:
            products = torch.linalg.vecdot(da.to(wide), a.to(wide))
            if bias2 is not None:
                bias = block.of(bias2).to(wide).unsqueeze(-1)
                products += torch.bmm(block.by_expert(dy).to(wide), bias).view(-1)
            block.own(products, out=d_weights[block.positions])

        du2.mul_(w)
        if d_down is not None:
            outer(block, dy, (a * w).to(x.dtype), d_down)
        if d_bias2 is not None:
            sum_rows(block, dy * w, d_bias2)
        if da2 is not None:
            outer(block, du2, a, da2)
        if db2 is not None:
            outer(block, dy, (low2 * w).to(x.dtype), db2)
        if not need_gate_up_side:
            continue

        dh = activation.backward(gate, da.mul_(w), h, value, dh_buffer[:n])
        du1 = reverse_up.low(block, dh, du1_buffer)
        if d_gate_up is not None or da1 is not None:
            rows = block.gather(x, tokens, row_buffer)
            if d_gate_up is not None:
                outer(block, dh, rows, d_gate_up)
            if da1 is not None:
                outer(block, du1, rows, da1)
        if d_bias1 is not None:
            sum_rows(block, dh, d_bias1)
        if db1 is not None:
            outer(block, dh, low1, db1)
        if dx is not None:
            # The gradient takes the place of the rows, which have served.
            rows = reverse_up.apply(block, dh, du1, row_buffer)
            dx.index_add_(0, tokens[block.positions], block.own(rows).to(dx.dtype))

    if d_weights is not None:
        by_pair = torch.empty_like(d_weights).index_copy_(0, order, d_weights)
        gradients["routing_weights"] = by_pair.view_as(weights).to(weights.dtype)
    if dx is not None:
        gradients["x"] = dx.to(x.dtype)
    return gradients
