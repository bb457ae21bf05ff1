"""Native CPU implementation: one expert at a time, its whole chain while its rows are in cache.

Nothing of size ``S x H`` is ever allocated: rows are gathered per expert and summed straight into the output, and the
backward recomputes the activation from the gate/up projection, the one large intermediate that the forward keeps.

The low-rank product is written first and the base product is added to it: the sum is then rounded once, after the
large term, and not twice.
"""

from __future__ import annotations

import torch

from .. import activation
from ..activation import Gate
from ..grouped_linear.cpu import accumulator, linear, most_rows, outer, per_expert, segments, sum_rows


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
    parts = segments(offsets)
    most = most_rows(parts)
    intermediate = down.shape[2]
    tokens = order // routing_weights.shape[1]
    out = accumulator(x.shape, x)
    pair_weights = routing_weights.reshape(-1)[order].to(out.dtype).unsqueeze(-1)
    kept = order.shape[0] if keep else 0
    hidden = x.new_empty((kept, 2 * intermediate))
    low1 = x.new_empty((kept, 0 if gate_up_a is None else gate_up_a.shape[1]))
    low2 = x.new_empty((kept, 0 if down_a is None else down_a.shape[1]))
    # Rows of pairs without an expert here are never read again, but equal calls must return equal bits.
    for saved in (hidden, low1, low2):
        saved[offsets[-1] :].zero_()

    x_buffer = x.new_empty((most, x.shape[1]))
    h_buffer = x.new_empty((0 if keep else most, 2 * intermediate))
    a_buffer = x.new_empty((most, intermediate))
    y_buffer = x_buffer if out.dtype == x.dtype else out.new_empty((most, x.shape[1]))
    for e, start, end in parts:
        m = end - start
        rows = tokens[start:end]
        x_e, a_e = x_buffer[:m], a_buffer[:m]
        h_e = hidden[start:end] if keep else h_buffer[:m]
        bias1 = None if gate_up_bias is None else gate_up_bias[e]
        bias2 = None if down_bias is None else down_bias[e]
        torch.index_select(x, 0, rows, out=x_e)
        if gate_up_a is not None and gate_up_b is not None:
            u_e = torch.mm(x_e, gate_up_a[e].t(), out=low1[start:end] if keep else None)
            linear(x_e, gate_up[e], h_e, bias1, u_e, gate_up_b[e])
        else:
            linear(x_e, gate_up[e], h_e, bias1)
        activation.forward(gate, h_e, out=a_e)
        if down_a is not None and down_b is not None:
            u_e = torch.mm(a_e, down_a[e].t(), out=low2[start:end] if keep else None)
            y_e = linear(a_e, down[e], x_e, bias2, u_e, down_b[e])
        else:
            y_e = linear(a_e, down[e], x_e, bias2)
        out.index_add_(0, rows, torch.mul(y_e, pair_weights[start:end], out=y_buffer[:m]))
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
    parts = segments(offsets)
    most = most_rows(parts)
    intermediate = down.shape[2]
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
    for e, start, end in parts:
        m = end - start
        rows, w_e = tokens[start:end], pair_weights[start:end]
        h_e = hidden[start:end]
        dy = torch.index_select(grad_out, 0, rows, out=row_buffer[:m])
        a_e, value = activation.recompute(gate, h_e, out=a_buffer[:m], value=value_buffer[:m])

        # The gradient before the routing weight comes first: <dy, down(a)> = <da, a> + <dy, bias> is then the routing
        # weight's own gradient, without keeping down(a).
        if down_a is not None and down_b is not None:
            du2 = torch.mm(dy, down_b[e])
            da = torch.mm(du2, down_a[e], out=da_buffer[:m]).addmm_(dy, down[e])
            du2.mul_(w_e)
        else:
            da = torch.mm(dy, down[e], out=da_buffer[:m])
        if need_weights:
            torch.linalg.vecdot(da.to(wide), a_e.to(wide), out=d_weights[start:end])
            if down_bias is not None:
                d_weights[start:end].addmv_(dy.to(wide), down_bias[e].to(wide))
        if d_down is not None:
            outer(dy, (a_e * w_e).to(x.dtype), d_down[e])
        if d_bias2 is not None:
            sum_rows(dy * w_e, d_bias2[e])
        if da2 is not None:
            torch.mm(du2.t(), a_e, out=da2[e])
        if db2 is not None:
            torch.mm(dy.t(), (low2[start:end] * w_e).to(x.dtype), out=db2[e])
        if not need_gate_up_side:
            continue

        da.mul_(w_e)
        dh = activation.backward(gate, da, h_e, value, dh_buffer[:m])
        if d_bias1 is not None:
            sum_rows(dh, d_bias1[e])

        if gate_up_b is not None:
            du1 = torch.mm(dh, gate_up_b[e])
        if d_gate_up is not None or da1 is not None:
            x_e = torch.index_select(x, 0, rows, out=row_buffer[:m])
            if d_gate_up is not None:
                outer(dh, x_e, d_gate_up[e])
            if da1 is not None:
                torch.mm(du1.t(), x_e, out=da1[e])
        if db1 is not None:
            torch.mm(dh.t(), low1[start:end], out=db1[e])
        if dx is not None:
            if gate_up_a is not None:
                dx_e = torch.mm(du1, gate_up_a[e], out=row_buffer[:m]).addmm_(dh, gate_up[e])
            else:
                dx_e = torch.mm(dh, gate_up[e], out=row_buffer[:m])
            if dx_e.dtype != dx.dtype:
                dx_e = sum_buffer[:m].copy_(dx_e)
            dx.index_add_(0, rows, dx_e)

    d_routing = None
    if need_weights:
        d_routing = torch.empty_like(d_weights).index_copy_(0, order, d_weights)
        d_routing = d_routing.view_as(routing_weights).to(routing_weights.dtype)
    dx = None if dx is None else dx.to(x.dtype)
    return [dx, d_gate_up, d_down, d_routing, da1, db1, da2, db2, d_bias1, d_bias2]
