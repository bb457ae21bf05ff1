"""Native CPU implementation: a few experts at a time, their whole chain while their rows are in cache.

Nothing of size ``S x H`` is ever allocated: rows are gathered for the experts at hand and summed straight into the
output, and the backward recomputes the activation from the gate/up projection, the one large intermediate that the
forward keeps. Consecutive experts' rows are consecutive, so all but the matrix products runs once for several experts:
one expert's few dozen rows would not be worth a second thread.

The low-rank product is written first and the base product is added to it: the sum is then rounded once, after the
large term, and not twice.
"""

from __future__ import annotations

import torch

from .. import activation
from ..activation import Gate
from ..cpu_matmul import product, rounded, two_products
from ..grouped_linear.cpu import accumulator, linear, outer, per_expert, segments, sum_rows

Part = tuple[int, int, int]
Views = tuple[torch.Tensor, ...] | None

# Elements of a buffer of one chunk's rows: 1 MB of float32, so that the half dozen of them stay in cache.
_CHUNK_ELEMENTS = 1 << 18


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


def _unbind(stack: torch.Tensor | None) -> Views:
    return None if stack is None else stack.unbind()


def _unbind_t(stack: torch.Tensor | None) -> Views:
    return None if stack is None else stack.mT.unbind()


def _most_rows(chunks: list[list[Part]]) -> int:
    """Rows of a buffer for the fullest chunk, with as many more as a product of one of its experts may read."""
    ends = (start - chunk[0][1] + rounded(end - start) for chunk in chunks for _, start, end in chunk)
    return max(ends, default=0)


def forward(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing_weights: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate: Gate,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.experts.op.experts_forward`."""
    intermediate = down.shape[2]
    parts = segments(offsets)
    chunks = _chunks(parts, max(x.shape[1], 2 * intermediate))
    most = _most_rows(chunks)
    tokens = order // routing_weights.shape[1]
    out = accumulator(x.shape, x)
    pair_weights = routing_weights.reshape(-1)[order].to(out.dtype).unsqueeze(-1)
    kept = order.shape[0] if keep else 0
    # With the rows that a product may read behind an expert's own: products with and without keeping are then the same
    # to the bit, which checkpointing relies on.
    slack = max((rounded(end - start) - (end - start) for _, start, end in parts), default=0) if keep else 0
    hidden = x.new_empty((kept + slack, 2 * intermediate))[:kept]
    low1 = x.new_empty((kept + slack, 0 if gate_up_a is None else gate_up_a.shape[1]))[:kept]
    low2 = x.new_empty((kept + slack, 0 if down_a is None else down_a.shape[1]))[:kept]
    # Rows of pairs without an expert here are never read again, but equal calls must return equal bits.
    for saved in (hidden, low1, low2):
        saved[offsets[-1] :].zero_()

    x_buffer = x.new_empty((most, x.shape[1]))
    h_buffer = x.new_empty((0 if keep else most, 2 * intermediate))
    a_buffer = x.new_empty((most, intermediate))
    y_buffer = x_buffer if out.dtype == x.dtype else out.new_empty((most, x.shape[1]))
    u1_buffer = x.new_empty((0 if keep else most, 0 if gate_up_a is None else gate_up_a.shape[1]))
    u2_buffer = x.new_empty((0 if keep else most, 0 if down_a is None else down_a.shape[1]))
    # Views are made for all experts at once: one by one they would cost as much as the smaller products.
    gate_ups, downs = gate_up.mT.unbind(), down.mT.unbind()
    a1s, b1s, bias1s = _unbind_t(gate_up_a), _unbind_t(gate_up_b), _unbind(gate_up_bias)
    a2s, b2s, bias2s = _unbind_t(down_a), _unbind_t(down_b), _unbind(down_bias)
    for chunk in chunks:
        first, last = chunk[0][1], chunk[-1][2]
        n = last - first
        sizes = [end - start for _, start, end in chunk]
        h = hidden[first:last] if keep else h_buffer[:n]
        rows = torch.index_select(x, 0, tokens[first:last], out=x_buffer[:n])
        row_parts = rows.split(sizes)
        u1s = (low1[first:last] if keep else u1_buffer[:n]).split(sizes)
        for (e, _, _), x_e, h_e, u_e in zip(chunk, row_parts, h.split(sizes), u1s, strict=True):
            if a1s is not None and b1s is not None:
                low = product(x_e, a1s[e], u_e)
                linear(x_e, gate_ups[e], h_e, None if bias1s is None else bias1s[e], low, b1s[e])
            else:
                linear(x_e, gate_ups[e], h_e, None if bias1s is None else bias1s[e])
        a = activation.forward(gate, h, out=a_buffer[:n])
        u2s = (low2[first:last] if keep else u2_buffer[:n]).split(sizes)
        # The output takes the place of the rows, which have served.
        for (e, _, _), a_e, y_e, u_e in zip(chunk, a.split(sizes), row_parts, u2s, strict=True):
            if a2s is not None and b2s is not None:
                low = product(a_e, a2s[e], u_e)
                linear(a_e, downs[e], y_e, None if bias2s is None else bias2s[e], low, b2s[e])
            else:
                linear(a_e, downs[e], y_e, None if bias2s is None else bias2s[e])
        out.index_add_(0, tokens[first:last], torch.mul(rows, pair_weights[first:last], out=y_buffer[:n]))
    return out.to(x.dtype), hidden, low1, low2


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    hidden: torch.Tensor,
    low1: torch.Tensor,
    low2: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing_weights: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate: Gate,
    needs: list[bool],
) -> list[torch.Tensor | None]:
    """See :func:`scattermoe_lora.ops.experts.op.experts_backward`."""
    (
        need_x,
        need_gate_up,
        need_down,
        need_weights,
        need_a1,
        need_b1,
        need_a2,
        need_b2,
        need_bias1,
        need_bias2,
    ) = needs
    intermediate = down.shape[2]
    parts = segments(offsets)
    chunks = _chunks(parts, max(x.shape[1], 2 * intermediate))
    most = _most_rows(chunks)
    tokens = order // routing_weights.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pair_weights = routing_weights.reshape(-1)[order].to(wide).unsqueeze(-1)

    dx = accumulator(x.shape, x) if need_x else None
    d_weights = torch.zeros(order.shape, dtype=wide)
    d_gate_up = per_expert(gate_up, parts) if need_gate_up else None
    d_down = per_expert(down, parts) if need_down else None
    da1 = per_expert(gate_up_a, parts) if need_a1 and gate_up_a is not None else None
    db1 = per_expert(gate_up_b, parts) if need_b1 and gate_up_b is not None else None
    da2 = per_expert(down_a, parts) if need_a2 and down_a is not None else None
    db2 = per_expert(down_b, parts) if need_b2 and down_b is not None else None
    d_bias1 = per_expert(gate_up_bias, parts) if need_bias1 and gate_up_bias is not None else None
    d_bias2 = per_expert(down_bias, parts) if need_bias2 and down_bias is not None else None
    need_gate_up_side = dx is not None or any(d is not None for d in (d_gate_up, da1, db1, d_bias1))

    row_buffer = x.new_empty((most, x.shape[1]))
    sum_buffer = row_buffer if dx is None or dx.dtype == x.dtype else dx.new_empty((most, x.shape[1]))
    value_buffer, a_buffer, da_buffer = (x.new_empty((most, intermediate)) for _ in range(3))
    dh_buffer = x.new_empty((most, 2 * intermediate))
    du1_buffer = x.new_empty((most, 0 if gate_up_a is None else gate_up_a.shape[1]))
    du2_buffer = x.new_empty((most, 0 if down_a is None else down_a.shape[1]))
    gate_ups, downs = gate_up.unbind(), down.unbind()
    a1s, b1s, a2s, b2s = (_unbind(t) for t in (gate_up_a, gate_up_b, down_a, down_b))
    da1s, db1s, da2s, db2s = _unbind(da1), _unbind(db1), _unbind(da2), _unbind(db2)
    for chunk in chunks:
        first, last = chunk[0][1], chunk[-1][2]
        n = last - first
        sizes = [end - start for _, start, end in chunk]
        experts = [e for e, _, _ in chunk]
        w = pair_weights[first:last]
        h = hidden[first:last]
        dy = torch.index_select(grad_out, 0, tokens[first:last], out=row_buffer[:n])
        a, value = activation.recompute(gate, h, out=a_buffer[:n], value=value_buffer[:n])
        da, du2 = da_buffer[:n], du2_buffer[:n]
        dy_parts, a_parts, du2_parts = dy.split(sizes), a.split(sizes), du2.split(sizes)

        # The gradient before the routing weight comes first: <dy, down(a)> = <da, a> + <dy, bias> is then the routing
        # weight's own gradient, without keeping down(a).
        for e, dy_e, da_e, du_e in zip(experts, dy_parts, da.split(sizes), du2_parts, strict=True):
            if a2s is not None and b2s is not None:
                two_products(dy_e, downs[e], product(dy_e, b2s[e], du_e), a2s[e], da_e)
            else:
                product(dy_e, downs[e], da_e)
        if need_weights:
            torch.linalg.vecdot(da.to(wide), a.to(wide), out=d_weights[first:last])
            if down_bias is not None:
                for e, dy_e, d_e in zip(experts, dy_parts, d_weights[first:last].split(sizes), strict=True):
                    d_e.addmv_(dy_e.to(wide), down_bias[e].to(wide))

        du2.mul_(w)
        w_parts = w.split(sizes)
        u2_parts = (low2[first:last] * w).to(x.dtype).split(sizes)
        for i, e in enumerate(experts):
            if d_down is not None:
                outer(dy_parts[i], (a_parts[i] * w_parts[i]).to(x.dtype), d_down[e])
            if d_bias2 is not None:
                sum_rows(dy_parts[i] * w_parts[i], d_bias2[e])
            if da2s is not None:
                torch.mm(du2_parts[i].t(), a_parts[i], out=da2s[e])
            if db2s is not None:
                torch.mm(dy_parts[i].t(), u2_parts[i], out=db2s[e])
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
            if db1s is not None:
                torch.mm(dh_e.t(), u_e, out=db1s[e])
            if a1s is not None and b1s is not None:
                du1 = product(dh_e, b1s[e], du_e)
                if da1s is not None:
                    torch.mm(du1.t(), x_e, out=da1s[e])
                if dx is not None:
                    # The gradient takes the place of the rows, which have served.
                    two_products(dh_e, gate_ups[e], du1, a1s[e], x_e)
            elif dx is not None:
                product(dh_e, gate_ups[e], x_e)
        if dx is not None:
            dx.index_add_(
                0, tokens[first:last], rows if rows.dtype == dx.dtype else sum_buffer[:n].copy_(rows)
            )

    d_routing = None
    if need_weights:
        d_routing = torch.empty_like(d_weights).index_copy_(0, order, d_weights)
        d_routing = d_routing.view_as(routing_weights).to(routing_weights.dtype)
    dx = None if dx is None else dx.to(x.dtype)
    return [dx, d_gate_up, d_down, d_routing, da1, db1, da2, db2, d_bias1, d_bias2]
