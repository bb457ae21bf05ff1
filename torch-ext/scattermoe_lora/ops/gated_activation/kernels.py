"""Triton kernels: the activations with their derivatives, and ``act(gate) * up`` forward and backward."""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def activation(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """``(act(gate), act'(gate))`` in float32."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(ALPHA * gate)
        value = gate * sigmoid
        slope = sigmoid * (1 + ALPHA * gate * (1 - sigmoid))
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
def _bounded(x, bound):
    # Comparisons, not minimum and maximum: these would lose a NaN.
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _columns(I, BLOCK: tl.constexpr):
    """A program's row, 64-bit, as what is multiplied by it may pass 2^31; its columns; and which of them are there."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(0).to(tl.int64), column, column < I


@triton.jit
def gated_forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    I,
    stride_g,
    stride_u,
    LARGEST: tl.constexpr,
    LIMIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``act(gate) * up``, rounded between the two as PyTorch's operators do; with a ``LIMIT`` not, but clamped."""
    row, column, mask = _columns(I, BLOCK)
    gate = tl.load(gate_ptr + row * stride_g + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_u + column, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    if LIMIT is None:
        value, _ = activation(gate, ACTIVATION, 1.0)
        out = value.to(dtype).to(tl.float32) * up
    else:
        value, _ = activation(_bounded(gate, LARGEST), ACTIVATION, 1.0)
        out = _bounded(value * _bounded(up, LARGEST), LIMIT)
    tl.store(out_ptr + row * I + column, out.to(dtype), mask=mask)


@triton.jit
def gated_backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    I,
    stride_y,
    stride_g,
    stride_u,
    LARGEST: tl.constexpr,
    LIMIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of ``gate`` and ``up``, each rounded once; with a ``LIMIT`` none where something was clamped."""
    row, column, mask = _columns(I, BLOCK)
    dy = tl.load(dy_ptr + row * stride_y + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_g + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_u + column, mask=mask, other=0.0).to(tl.float32)
    if LIMIT is not None:
        inside = (tl.abs(gate) <= LARGEST) & (tl.abs(up) <= LARGEST)
        gate = _bounded(gate, LARGEST)
        up = _bounded(up, LARGEST)
    value, slope = activation(gate, ACTIVATION, 1.0)
    d_gate = dy * up * slope
    d_up = dy * value
    if LIMIT is not None:
        inside = inside & (tl.abs(value * up) <= LIMIT)
        d_gate = tl.where(inside, d_gate, 0.0)
        d_up = tl.where(inside, d_up, 0.0)
    tl.store(d_gate_ptr + row * I + column, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + row * I + column, d_up.to(d_up_ptr.dtype.element_ty), mask=mask)
