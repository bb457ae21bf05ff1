"""Triton kernels: the gated activation between the two grouped GEMMs, forward and backward."""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _activation(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
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
def _gated(
    h_tile,
    I,
    mask,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """``(value, d value / d gate, factor, d factor / d up)`` of ``value(gate) * factor(up)`` in float32."""
    gate = tl.load(h_tile, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_tile + (1 if INTERLEAVED else I), mask=mask, other=0.0).to(tl.float32)
    # An early return would leave the rest to be compiled all the same, with a limit of None.
    if LIMIT is None:
        value, slope = _activation(gate, ACTIVATION, ALPHA)
        factor = up + SHIFT
        passes = tl.full(up.shape, 1.0, tl.float32)
    else:
        # Comparisons, not minimum and maximum: these would lose a NaN. It is within no bounds, and gets no gradient.
        value, slope = _activation(tl.where(gate > LIMIT, LIMIT, gate), ACTIVATION, ALPHA)
        slope = tl.where(gate <= LIMIT, slope, 0.0)
        factor = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + SHIFT
        passes = tl.where(tl.abs(up) <= LIMIT, 1.0, 0.0)
    return value, slope, factor, passes


@triton.jit
def gate_forward_kernel(
    h_ptr,
    out_ptr,
    I,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < I
    h_tile = h_ptr + row * 2 * I + column * (2 if INTERLEAVED else 1)
    value, _, factor, _ = _gated(h_tile, I, mask, ACTIVATION, INTERLEAVED, ALPHA, LIMIT, SHIFT)
    tl.store(out_ptr + row * I + column, (value * factor).to(out_ptr.dtype.element_ty), mask=mask)


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
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
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
        at = row * 2 * I + column * (2 if INTERLEAVED else 1)
        value, slope, factor, passes = _gated(
            h_ptr + at, I, mask, ACTIVATION, INTERLEAVED, ALPHA, LIMIT, SHIFT
        )
        a = value * factor
        total += tl.where(mask, da * a, 0.0)
        da = da * weight
        dtype = dh_ptr.dtype.element_ty
        tl.store(a_ptr + row * I + column, a.to(dtype), mask=mask)
        d_gate, d_up = da * factor * slope, da * value * passes
        if LIMIT is not None:
            # Nothing comes through a clamp, and of a NaN times zero a NaN would.
            d_gate = tl.where(slope != 0.0, d_gate, 0.0)
            d_up = tl.where(passes != 0.0, d_up, 0.0)
        tl.store(dh_ptr + at, d_gate.to(dtype), mask=mask)
        tl.store(dh_ptr + at + (1 if INTERLEAVED else I), d_up.to(dtype), mask=mask)
    tl.store(d_row_weight_ptr + pair, tl.sum(total, axis=0))
