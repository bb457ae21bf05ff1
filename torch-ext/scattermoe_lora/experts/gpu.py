"""Triton implementation: two grouped GEMMs around a fused gated activation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..grouped_linear.gpu import grouped_matmul, grouped_outer, sum_choices


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _activation(gate, ACTIVATION: tl.constexpr):
    """``(act(gate), act'(gate))`` in float32."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid * (1 + gate * (1 - sigmoid))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        tanh = _tanh(inner)
        value = 0.5 * gate * (1 + tanh)
        d_inner = 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * d_inner
    else:
        cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        value = gate * cdf
        slope = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return value, slope


@triton.jit
def _gate_forward_kernel(h_ptr, out_ptr, I, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < I
    gate = tl.load(h_ptr + row * 2 * I + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * I + I + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activation(gate, ACTIVATION)
    tl.store(out_ptr + row * I + column, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_backward_kernel(
    da_ptr,
    h_ptr,
    row_weight_ptr,
    order_ptr,
    a_ptr,
    dh_ptr,
    d_row_weight_ptr,
    I,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``da`` is the gradient before the routing weight: ``<da, a>`` is then the routing weight's own gradient."""
    position = tl.program_id(0)
    row = position.to(tl.int64)
    pair = tl.load(order_ptr + position)
    weight = tl.load(row_weight_ptr + pair).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, I, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < I
        da = tl.load(da_ptr + row * I + column, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(h_ptr + row * 2 * I + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + row * 2 * I + I + column, mask=mask, other=0.0).to(tl.float32)
        value, slope = _activation(gate, ACTIVATION)
        a = value * up
        total += da * a
        da = da * weight
        dtype = dh_ptr.dtype.element_ty
        tl.store(a_ptr + row * I + column, a.to(dtype), mask=mask)
        tl.store(dh_ptr + row * 2 * I + column, (da * up * slope).to(dtype), mask=mask)
        tl.store(dh_ptr + row * 2 * I + I + column, (da * value).to(dtype), mask=mask)
    tl.store(d_row_weight_ptr + pair, tl.sum(total, axis=0))


def _gate_forward(h: torch.Tensor, activation: str) -> torch.Tensor:
    rows, width = h.shape
    out = h.new_empty((rows, width // 2))
    if rows:
        block = min(1024, triton.next_power_of_2(width // 2))
        grid = (rows, triton.cdiv(width // 2, block))
        _gate_forward_kernel[grid](h, out, width // 2, ACTIVATION=activation, BLOCK=block)
    return out


def _gate_backward(
    da: torch.Tensor, h: torch.Tensor, row_weight: torch.Tensor, order: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(a, dh, d_row_weight)``: the activation again, the gradients of ``h`` and of the routing weights by pair."""
    rows, intermediate = da.shape
    a, dh = torch.empty_like(da), torch.empty_like(h)
    d_row_weight = torch.empty(rows, dtype=torch.float32, device=da.device)
    if rows:
        block = min(1024, triton.next_power_of_2(intermediate))
        _gate_backward_kernel[(rows,)](
            da, h, row_weight, order, a, dh, d_row_weight, intermediate, ACTIVATION=activation, BLOCK=block
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
    activation: str,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.experts.op.experts_forward`."""
    top_k = routing_weights.shape[1]
    no_rank = x.new_empty((order.shape[0] if keep else 0, 0))
    low1 = low2 = None
    if gate_up_a is not None:
        low1 = grouped_matmul(x, gate_up_a, order, offsets, top_k=top_k)
    hidden = grouped_matmul(x, gate_up, order, offsets, top_k=top_k, low=low1, low_weight=gate_up_b)
    a = _gate_forward(hidden, activation)
    if down_a is not None:
        low2 = grouped_matmul(a, down_a, order, offsets)
    y = grouped_matmul(
        a,
        down,
        order,
        offsets,
        low=low2,
        low_weight=down_b,
        row_weight=routing_weights.reshape(-1),
        scatter=True,
    )
    out = sum_choices(y, x.shape[0])
    kept = [no_rank if t is None else t if keep else t.new_empty((0, t.shape[1])) for t in (hidden, low1, low2)]
    return out, kept[0], kept[1], kept[2]


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
    activation: str,
    needs: list[bool],
) -> list[torch.Tensor | None]:
    """See :func:`scattermoe_lora.experts.op.experts_backward`."""
    need_x, need_gate_up, need_down, need_weights, need_a1, need_b1, need_a2, need_b2 = needs
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
    a, dh, d_row_weight = _gate_backward(da, hidden, row_weight, order, activation)

    dx = d_gate_up = d_down = d_routing = da1 = db1 = da2 = db2 = None
    if need_weights:
        d_routing = d_row_weight.view_as(routing_weights).to(routing_weights.dtype)
    if need_down:
        d_down = grouped_outer(grad_out, a, order, offsets, top_k_p=top_k, row_weight=row_weight)
    if need_a2 and du2 is not None:
        da2 = grouped_outer(du2, a, order, offsets, row_weight=row_weight)
    if need_b2:
        db2 = grouped_outer(grad_out, low2, order, offsets, top_k_p=top_k, row_weight=row_weight)
    du1 = None if gate_up_b is None else grouped_matmul(dh, gate_up_b.mT, order, offsets)
    if need_gate_up:
        d_gate_up = grouped_outer(dh, x, order, offsets, top_k_q=top_k)
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
    return [dx, d_gate_up, d_down, d_routing, da1, db1, da2, db2]
