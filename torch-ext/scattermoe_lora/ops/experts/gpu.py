"""Triton implementation: two grouped GEMMs, the first of which ends with the gated activation."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch

from ..activation import Gate
from ..grouped_linear import gpu
from ..grouped_linear.gpu import (
    bias_gradient,
    grouped_matmul,
    grouped_outer,
    launches,
    weight_gradient,
)
from ..grouped_linear.pairs import sum_choices
from ..grouped_linear.schedule import Scheduled
from ..grouped_linear.workspace import LowRank
from ..launch import cdiv, next_power_of_2
from ..launcher import launch_kernel
from ..quantization.stack import QuantizedStack, Weight
from ..routing import Routing
from .arguments import Kept, Operands
from .kernels import gate_backward_kernel, gate_forward_kernel, gate_up_kernel
from .kernels_backward import matmul_gate_backward_kernel

# Columns that a program of the activation's kernels computes at a time.
GATE_BLOCK = 1024


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
    weight: Weight,
    routing: Routing,
    top_k: int,
    low: LowRank | None,
    bias: torch.Tensor | None,
    gate: Gate,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate/up projection ``[S, 2I]``, without rows unless ``keep``, and its gated activation ``[S, I]``."""
    pairs, width = routing.order.shape[0], weight.shape[1]
    a = x.new_empty((pairs, width // 2))
    if isinstance(weight, QuantizedStack):
        # The two columns that a gate joins may be far apart in a stored matrix, of which a tile is one piece; and a
        # program that walks over the tiles of a share has no registers left for the gate.
        hidden = grouped_matmul(x, weight, routing, top_k=top_k, low=low, bias=bias)
        if pairs:
            block = min(GATE_BLOCK, next_power_of_2(a.shape[1]))
            grid = (pairs, cdiv(a.shape[1], block), 1)
            launch_kernel(
                gate_forward_kernel, grid, (hidden, a, a.shape[1]), {**_constants(gate), "BLOCK": block}
            )
        return hidden if keep else x.new_empty((0, width)), a
    hidden = x.new_empty((pairs if keep else 0, width))
    if pairs:
        parts = 1 if gate.interleaved else 2
        # A program a tile, always: the sum over the hidden size is long.
        (launch,) = launches(x, weight, routing, top_k=top_k, low=low, bias=bias, parts=parts)
        launch_kernel(
            gate_up_kernel,
            (launch.programs, 1, 1),
            (*launch.arguments, hidden, a),
            {"KEEP": keep, **_constants(gate), **launch.constants},
        )
    return hidden, a


def _gate_backward(
    da: torch.Tensor, h: torch.Tensor, row_weight: torch.Tensor, order: torch.Tensor, gate: Gate
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(a, dh, d_row_weight)``: the activation again, the gradients of ``h`` and of the routing weights by pair."""
    rows, intermediate = da.shape
    a, dh = torch.empty_like(da), torch.empty_like(h)
    d_row_weight = torch.empty(rows, dtype=torch.float32, device=da.device)
    if rows:
        block = min(GATE_BLOCK, next_power_of_2(intermediate))
        launch_kernel(
            gate_backward_kernel,
            (rows, 1, 1),
            (da, h, row_weight, order, a, dh, d_row_weight, intermediate),
            {**_constants(gate), "BLOCK": block},
        )
    return a, dh, d_row_weight


def gate_gradients(
    grad_out: torch.Tensor,
    down: Weight,
    routing: Scheduled,
    top_k: int,
    low: LowRank | None,
    hidden: torch.Tensor,
    row_weight: torch.Tensor,
    gate: Gate,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What :func:`_gate_backward` returns of ``grad_out`` ``[T, H]``; ``hidden`` is the first projection, and ``low``
    are the factors of the gradient through the second."""
    weight = down.mT
    pairs, intermediate = routing.order.shape[0], weight.shape[1]
    blocks = gpu.tile("grouped_matmul", grad_out, routing.rows, *weight.shape[1:])
    # The shares of a quantized weight gain less by it than programs that walk over tiles would cost here.
    is_one_launch = blocks.get("GATE_BACKWARD") and not gate.interleaved and isinstance(weight, torch.Tensor)
    if not is_one_launch or not pairs:
        da = grouped_matmul(grad_out, weight, routing, top_k=top_k, low=low)
        return _gate_backward(da, hidden, row_weight, routing.order, gate)
    a, dh = grad_out.new_empty((pairs, intermediate)), torch.empty_like(hidden)
    sums = hidden.new_empty((pairs, cdiv(intermediate, blocks["BLOCK_N"])), dtype=torch.float32)
    activation = {name: value for name, value in _constants(gate).items() if name != "INTERLEAVED"}
    (launch,) = launches(grad_out, weight, routing, top_k=top_k, low=low)
    launch_kernel(
        matmul_gate_backward_kernel,
        (launch.programs, 1, 1),
        (*launch.arguments, hidden, row_weight, a, dh, sums),
        {**activation, **launch.constants},
    )
    return a, dh, sums.sum(1)


def forward(
    operands: Operands, gate: Gate, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.experts.op.experts_forward`."""
    x, gate_up, down, weights, a1, b1, a2, b2, bias1, bias2, *_ = operands
    routing, top_k = Scheduled(*operands.routing), weights.shape[1]
    low1 = None if a1 is None or b1 is None else (grouped_matmul(x, a1, routing, top_k=top_k), b1)
    hidden, a = project_and_gate(x, gate_up, routing, top_k, low1, bias1, gate, keep)
    low2 = None if a2 is None or b2 is None else (grouped_matmul(a, a2, routing), b2)
    y = grouped_matmul(a, down, routing, low=low2, bias=bias2, row_weight=weights.reshape(-1), scatter=True)
    kept1, kept2 = (
        low[0] if low is not None and keep else x.new_empty((hidden.shape[0], rank))
        for low, rank in zip((low1, low2), operands.ranks, strict=True)
    )
    return sum_choices(y, x.shape[0]), hidden, kept1, kept2


def backward(
    grad_out: torch.Tensor, operands: Operands, kept: Kept, gate: Gate, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.experts.op.experts_backward`; ``names`` are the operands that need one."""
    x, gate_up, down, weights, a1, b1, a2, b2, _, bias2, *_ = operands
    routing, top_k, row_weight = Scheduled(*operands.routing), weights.shape[1], weights.reshape(-1)
    low2 = low1 = None
    if a2 is not None and b2 is not None:
        low2 = grouped_matmul(grad_out, b2.mT, routing, top_k=top_k), a2.mT
    a, dh, d_row_weight = gate_gradients(grad_out, down, routing, top_k, low2, kept.hidden, row_weight, gate)
    if a1 is not None and b1 is not None:
        low1 = grouped_matmul(dh, b1.mT, routing), a1.mT

    gradients = {}
    if "routing_weights" in names:
        if bias2 is not None:
            through_bias = grouped_matmul(grad_out, bias2.unsqueeze(1), routing, top_k=top_k, scatter=True)
            d_row_weight += through_bias.squeeze(1)
        gradients["routing_weights"] = d_row_weight.view_as(weights).to(weights.dtype)
    # What is weighted by the routing weights is a gradient of the second projection.
    weighted: dict[str, Any] = {"top_k_p": top_k, "row_weight": row_weight}
    if "down" in names:
        gradients["down"] = weight_gradient(down, grad_out, a, routing, **weighted)
    if "down_bias" in names:
        gradients["down_bias"] = bias_gradient(grad_out, routing, top_k=top_k, row_weight=row_weight)
    if "gate_up_bias" in names:
        gradients["gate_up_bias"] = bias_gradient(dh, routing)
    if "down_a" in names and low2 is not None:
        gradients["down_a"] = grouped_outer(low2[0], a, routing, row_weight=row_weight)
    if "down_b" in names:
        gradients["down_b"] = grouped_outer(grad_out, kept.down_low, routing, **weighted)
    if "gate_up" in names:
        gradients["gate_up"] = weight_gradient(gate_up, dh, x, routing, top_k_q=top_k)
    if "gate_up_a" in names and low1 is not None:
        gradients["gate_up_a"] = grouped_outer(low1[0], x, routing, top_k_q=top_k)
    if "gate_up_b" in names:
        gradients["gate_up_b"] = grouped_outer(dh, kept.gate_up_low, routing)
    if "x" in names:
        dx = grouped_matmul(dh, gate_up.mT, routing, low=low1, scatter=True)
        gradients["x"] = sum_choices(dx, x.shape[0])
    return gradients
