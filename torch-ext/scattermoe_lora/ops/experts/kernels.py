"""Triton kernels: the gated activation between the two grouped GEMMs, forward and backward."""

import triton
import triton.language as tl


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
def gate_forward_kernel(h_ptr, out_ptr, I, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < I
    gate = tl.load(h_ptr + row * 2 * I + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * I + I + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activation(gate, ACTIVATION)
    tl.store(out_ptr + row * I + column, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(
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
