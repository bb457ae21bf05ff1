"""Triton implementation: two grouped GEMMs, the first of which ends with the gated activation."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from ..activation import Gate
from ..grouped_linear.gpu import (
    bias_gradient,
    grouped_matmul,
    grouped_outer,
    product,
    sum_choices,
    weight_gradient,
)
from .kernels import gate_backward_kernel, gate_up_kernel


def _constants(gate: Gate) -> dict[str, Any]:
    limit = None if gate.limit == math.inf else gate.limit
    return {
        "ACTIVATION": gate.activation,
        "INTERLEAVED": gate.interleaved,
        "ALPHA": gate.alpha,
        "LIMIT": limit,
        "SHIFT": gate.shift,
    }


def project_and_gate(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    low: torch.Tensor | None,
    low_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate: Gate,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate/up projection ``[S, 2I]``, empty unless ``keep``, and its gated activation ``[S, I]``."""
    pairs, width = order.shape[0], weight.shape[1]
    hidden, a = x.new_empty((pairs if keep else 0, width)), x.new_empty((pairs, width // 2))
    if pairs:
        grid, operands, constants = product(
            x, weight, order, offsets, top_k=top_k, low=low, low_weight=low_weight, bias=bias
        )
        gate_up_kernel[grid](*operands, hidden, a, KEEP=keep, **_constants(gate), **constants)
    return hidden, a


def _gate_backward(
    da: torch.Tensor, h: torch.Tensor, row_weight: torch.Tensor, order: torch.Tensor, gate: Gate
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(a, dh, d_row_weight)``: the activation again, the gradients of ``h`` and of the routing weights by pair."""
    rows, intermediate = da.shape
    a, dh = torch.empty_like(da), torch.empty_like(h)
    d_row_weight = torch.empty(rows, dtype=torch.float32, device=da.device)
    if rows:
        block = min(1024, triton.next_power_of_2(intermediate))
        gate_backward_kernel[(rows,)](
            da, h, row_weight, order, a, dh, d_row_weight, intermediate, **_constants(gate), BLOCK=block
        )
    return a, dh, d_row_weight


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
    pairs, top_k = order.shape[0], routing_weights.shape[1]
    low1 = low2 = None
    if gate_up_a is not None:
        low1 = grouped_matmul(x, gate_up_a, order, offsets, top_k=top_k)
    hidden, a = project_and_gate(x, gate_up, order, offsets, top_k, low1, gate_up_b, gate_up_bias, gate, keep)
    if down_a is not None:
        low2 = grouped_matmul(a, down_a, order, offsets)
    y = grouped_matmul(
        a,
        down,
        order,
        offsets,
        low=low2,
        low_weight=down_b,
        bias=down_bias,
        row_weight=routing_weights.reshape(-1),
        scatter=True,
    )
    out = sum_choices(y, x.shape[0])
    low1, low2 = (x.new_empty((pairs, 0)) if low is None else low for low in (low1, low2))
    if not keep:
        low1, low2 = (low.new_empty((0, low.shape[1])) for low in (low1, low2))
    return out, hidden, low1, low2


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
    top_k = routing_weights.shape[1]
    row_weight = routing_weights.reshape(-1)
    du2 = None
    if down_b is not None:
        du2 = grouped_matmul(grad_out, down_b.mT, order, offsets, top_k=top_k)
    da = grouped_matmul(
        grad_out,
        down.mT,
        order,
        offsets,
        top_k=top_k,
        low=du2,
        low_weight=None if down_a is None else down_a.mT,
    )
    a, dh, d_row_weight = _gate_backward(da, hidden, row_weight, order, gate)

    dx = d_gate_up = d_down = d_routing = da1 = db1 = da2 = db2 = d_bias1 = d_bias2 = None
    if need_weights:
        if down_bias is not None:
            through_bias = grouped_matmul(
                grad_out, down_bias.unsqueeze(1), order, offsets, top_k=top_k, scatter=True
            )
            d_row_weight += through_bias.squeeze(1)
        d_routing = d_row_weight.view_as(routing_weights).to(routing_weights.dtype)
    if need_down:
        d_down = weight_gradient(down, grad_out, a, order, offsets, top_k_p=top_k, row_weight=row_weight)
    if need_bias2:
        d_bias2 = bias_gradient(grad_out, order, offsets, top_k=top_k, row_weight=row_weight)
    if need_bias1:
        d_bias1 = bias_gradient(dh, order, offsets)
    if need_a2 and du2 is not None:
        da2 = grouped_outer(du2, a, order, offsets, row_weight=row_weight)
    if need_b2:
        db2 = grouped_outer(grad_out, low2, order, offsets, top_k_p=top_k, row_weight=row_weight)
    du1 = None if gate_up_b is None else grouped_matmul(dh, gate_up_b.mT, order, offsets)
    if need_gate_up:
        d_gate_up = weight_gradient(gate_up, dh, x, order, offsets, top_k_q=top_k)
    if need_a1 and du1 is not None:
        da1 = grouped_outer(du1, x, order, offsets, top_k_q=top_k)
    if need_b1:
        db1 = grouped_outer(dh, low1, order, offsets)
    if need_x:
        dx = grouped_matmul(
            dh,
            gate_up.mT,
            order,
            offsets,
            low=du1,
            low_weight=None if gate_up_a is None else gate_up_a.mT,
            scatter=True,
        )
        dx = sum_choices(dx, x.shape[0])
    return [dx, d_gate_up, d_down, d_routing, da1, db1, da2, db2, d_bias1, d_bias2]
