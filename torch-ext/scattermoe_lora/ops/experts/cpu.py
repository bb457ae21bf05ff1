"""Native CPU implementation: a few experts at a time, their whole chain while their rows are in cache.

Nothing of size ``S x H`` is ever allocated: rows are gathered for the experts at hand and summed straight into the
output, and the backward recomputes the activation from the gate/up projection, the one large intermediate that the
forward keeps. Consecutive experts' rows are consecutive, so all but the matrix products runs once for several experts:
one expert's few dozen rows would not be worth a second thread.

The low-rank product is written first and the base product is added to it: the sum is then rounded once, after the
large term, and not twice.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from .. import activation
from ..activation import Gate
from ..cpu_matmul import rounded
from ..grouped_linear.cpu import (
    Part,
    Projection,
    accumulator,
    end_of,
    expert_ranges,
    outer,
    per_expert,
    sum_rows,
    transposed,
)
from .arguments import Kept, Operands

# Elements of a buffer of one chunk's rows: 1 MB of float32, so that the half dozen of them stay in cache.
_CHUNK_ELEMENTS = 1 << 18
# Operands with a part for each expert.
_PER_EXPERT = (*Operands._fields[1:3], *Operands._fields[4:10])


def _chunks(parts: list[Part], width: int) -> list[list[Part]]:
    """Consecutive parts in chunks of about as many rows as make ``_CHUNK_ELEMENTS`` at ``width`` columns."""
    chunks: list[list[Part]] = []
    rows = 0
    for part in parts:
        _, start, end = part
        if not chunks or rows + end - start > _CHUNK_ELEMENTS // width:
            chunks.append([])
            rows = 0
        chunks[-1].append(part)
        rows += end - start
    return chunks


def _most_rows(chunks: list[list[Part]]) -> int:
    """Rows of a buffer for the fullest chunk, with as many more as a product of one of its experts may read."""
    ends = (start - chunk[0][1] + rounded(end - start) for chunk in chunks for _, start, end in chunk)
    return max(ends, default=0)


def forward(
    operands: Operands, gate: Gate, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.experts.op.experts_forward`."""
    x, gate_up, down, weights, a1, b1, a2, b2, bias1, bias2, order, offsets = operands
    rank1, rank2 = operands.ranks
    intermediate = down.shape[2]
    parts = expert_ranges(offsets)
    chunks = _chunks(parts, max(x.shape[1], 2 * intermediate))
    most = _most_rows(chunks)
    tokens = order // weights.shape[1]
    out = accumulator(x.shape, x)
    pair_weights = weights.reshape(-1)[order].to(out.dtype).unsqueeze(-1)
    rows_kept = order.shape[0] if keep else 0
    # With the rows that a product may read behind an expert's own: products with and without keeping are then the same
    # to the bit, which checkpointing relies on.
    slack = max((rounded(end - start) - (end - start) for _, start, end in parts), default=0) if keep else 0
    kept = Kept(*(x.new_empty((rows_kept + slack, n))[:rows_kept] for n in (2 * intermediate, rank1, rank2)))
    # Rows of pairs without an expert here are never read again, but equal calls must return equal bits.
    for saved in kept if keep else ():
        saved[end_of(parts) :].zero_()

    x_buffer = x.new_empty((most, x.shape[1]))
    a_buffer = x.new_empty((most, intermediate))
    y_buffer = x_buffer if out.dtype == x.dtype else out.new_empty((most, x.shape[1]))
    buffers = Kept(*(x.new_empty((0 if keep else most, n)) for n in (2 * intermediate, rank1, rank2)))
    up_map, down_map = Projection(gate_up, a1, b1, bias1), Projection(down, a2, b2, bias2)
    for chunk in chunks:
        first, last = chunk[0][1], chunk[-1][2]
        n = last - first
        experts, sizes = [e for e, _, _ in chunk], [end - start for _, start, end in chunk]
        h, low1, low2 = (t[first:last] for t in kept) if keep else (t[:n] for t in buffers)
        rows = torch.index_select(x, 0, tokens[first:last], out=x_buffer[:n])
        x_parts, h_parts, low_parts = rows.split(sizes), h.split(sizes), low1.split(sizes)
        for e, x_e, h_e, low_e in zip(experts, x_parts, h_parts, low_parts, strict=True):
            up_map.apply(e, x_e, up_map.low(e, x_e, low_e), h_e)
        a = activation.forward(gate, h, out=a_buffer[:n])
        # The output takes the place of the rows, which have served.
        a_parts, low_parts = a.split(sizes), low2.split(sizes)
        for e, a_e, y_e, low_e in zip(experts, a_parts, x_parts, low_parts, strict=True):
            down_map.apply(e, a_e, down_map.low(e, a_e, low_e), y_e)
        out.index_add_(0, tokens[first:last], torch.mul(rows, pair_weights[first:last], out=y_buffer[:n]))
    return out.to(x.dtype), *kept


def backward(
    grad_out: torch.Tensor, operands: Operands, kept: Kept, gate: Gate, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.experts.op.experts_backward`; ``names`` are the operands that need one."""
    x, gate_up, down, weights, a1, b1, a2, b2, _, bias2, order, offsets = operands
    hidden, low1, low2 = kept
    rank1, rank2 = operands.ranks
    intermediate = down.shape[2]
    parts = expert_ranges(offsets)
    chunks = _chunks(parts, max(x.shape[1], 2 * intermediate))
    most = _most_rows(chunks)
    tokens = order // weights.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pair_weights = weights.reshape(-1)[order].to(wide).unsqueeze(-1)

    dx = accumulator(x.shape, x) if "x" in names else None
    d_weights = torch.zeros(order.shape, dtype=wide) if "routing_weights" in names else None
    gradients = {
        name: per_expert(getattr(operands, name), parts)
        for name in names
        if name not in ("x", "routing_weights")
    }
    d_gate_up, d_down, da1, db1, da2, db2, d_bias1, d_bias2 = map(gradients.get, _PER_EXPERT)
    need_gate_up_side = any(d is not None for d in (dx, d_gate_up, da1, db1, d_bias1))

    row_buffer = x.new_empty((most, x.shape[1]))
    sum_buffer = row_buffer if dx is None or dx.dtype == x.dtype else dx.new_empty((most, x.shape[1]))
    value_buffer, a_buffer, da_buffer = (x.new_empty((most, intermediate)) for _ in range(3))
    dh_buffer = x.new_empty((most, 2 * intermediate))
    du1_buffer, du2_buffer = (x.new_empty((most, rank)) for rank in (rank1, rank2))
    reverse_up = Projection(gate_up.mT, transposed(b1), transposed(a1))
    reverse_down = Projection(down.mT, transposed(b2), transposed(a2))
    for chunk in chunks:
        first, last = chunk[0][1], chunk[-1][2]
        n = last - first
        experts, sizes = [e for e, _, _ in chunk], [end - start for _, start, end in chunk]
        w = pair_weights[first:last]
        h = hidden[first:last]
        dy = torch.index_select(grad_out, 0, tokens[first:last], out=row_buffer[:n])
        a, value = activation.recompute(gate, h, out=a_buffer[:n], value=value_buffer[:n])
        da, du2 = da_buffer[:n], du2_buffer[:n]
        dy_parts, a_parts, du2_parts = dy.split(sizes), a.split(sizes), du2.split(sizes)

        # The gradient before the routing weight comes first: <dy, down(a)> = <da, a> + <dy, bias> is then the routing
        # weight's own gradient, without keeping down(a).
        for e, dy_e, da_e, du_e in zip(experts, dy_parts, da.split(sizes), du2_parts, strict=True):
            reverse_down.apply(e, dy_e, reverse_down.low(e, dy_e, du_e), da_e)
        if d_weights is not None:
            torch.linalg.vecdot(da.to(wide), a.to(wide), out=d_weights[first:last])
            if bias2 is not None:
                for e, dy_e, d_e in zip(experts, dy_parts, d_weights[first:last].split(sizes), strict=True):
                    d_e.addmv_(dy_e.to(wide), bias2[e].to(wide))

        du2.mul_(w)
        w_parts = w.split(sizes)
        u2_parts = (low2[first:last] * w).to(x.dtype).split(sizes)
        for i, e in enumerate(experts):
            if d_down is not None:
                outer(dy_parts[i], (a_parts[i] * w_parts[i]).to(x.dtype), d_down[e])
            if d_bias2 is not None:
                sum_rows(dy_parts[i] * w_parts[i], d_bias2[e])
            if da2 is not None:
                torch.mm(du2_parts[i].t(), a_parts[i], out=da2[e])
            if db2 is not None:
                torch.mm(dy_parts[i].t(), u2_parts[i], out=db2[e])
        if not need_gate_up_side:
            continue

        dh = activation.backward(gate, da.mul_(w), h, value, dh_buffer[:n])
        rows = row_buffer[:n]
        if d_gate_up is not None or da1 is not None:
            torch.index_select(x, 0, tokens[first:last], out=rows)
        u1_parts = low1[first:last].split(sizes)
        row_parts, dh_parts, du1_parts = rows.split(sizes), dh.split(sizes), du1_buffer[:n].split(sizes)
        for e, x_e, dh_e, u_e, du_e in zip(experts, row_parts, dh_parts, u1_parts, du1_parts, strict=True):
            if d_bias1 is not None:
                sum_rows(dh_e, d_bias1[e])
            if d_gate_up is not None:
                outer(dh_e, x_e, d_gate_up[e])
            if db1 is not None:
                torch.mm(dh_e.t(), u_e, out=db1[e])
            du1 = reverse_up.low(e, dh_e, du_e)
            if da1 is not None and du1 is not None:
                torch.mm(du1.t(), x_e, out=da1[e])
            if dx is not None:
                # The gradient takes the place of the rows, which have served.
                reverse_up.apply(e, dh_e, du1, x_e)
        if dx is not None:
            dx.index_add_(
                0, tokens[first:last], rows if rows.dtype == dx.dtype else sum_buffer[:n].copy_(rows)
            )

    if d_weights is not None:
        by_pair = torch.empty_like(d_weights).index_copy_(0, order, d_weights)
        gradients["routing_weights"] = by_pair.view_as(weights).to(weights.dtype)
    if dx is not None:
        gradients["x"] = dx.to(x.dtype)
    return gradients
