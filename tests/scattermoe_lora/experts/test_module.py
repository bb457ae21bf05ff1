"""Biases, transposed weights and clamped gates in the fused operators. Runs natively, and in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import AWKWARD, INTERPRETED, Shape, assert_close, low_rank, route
from hypothesis import given
from hypothesis import strategies as st

# Values of the gate reach 3; a limit of 0.8 cuts many of them off, on both sides.
GATES = {
    "swiglu": {"activation": "silu"},
    "interleaved": {"activation": "gelu", "interleaved": True},
    "clamped": {"activation": "silu", "limit": 0.8},
    "gpt-oss": {"activation": "silu", "interleaved": True, "alpha": 1.702, "limit": 0.8, "shift": 1.0},
    "shifted": {"activation": "gelu_tanh", "limit": math.inf, "shift": 0.5},
}


def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).requires_grad_()


def weight(experts: int, n_out: int, n_in: int, transposed: bool) -> torch.Tensor:
    if transposed:
        return leaf(experts, n_in, n_out, scale=n_in**-0.5)
    return leaf(experts, n_out, n_in, scale=n_in**-0.5)


def assert_experts_match(submodule, shape, gate, transposed, biased, adapted, sentinels) -> None:
    sizes = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    x = leaf(shape.tokens, shape.hidden, scale=1.5)
    routing_weights = torch.rand(shape.tokens, shape.top_k).requires_grad_()
    bases = [weight(shape.experts, *size, transposed) for size in sizes]
    biases = [leaf(shape.experts, n_out) if biased else None for n_out, _ in sizes]
    factors = [
        f.requires_grad_() if adapted else None
        for size in sizes
        for f in low_rank(shape.experts, *size, shape.rank)
    ]
    index = route(shape, sentinels)
    grad = torch.randn(shape.tokens, shape.hidden)
    leaves = [t for t in (x, *bases, routing_weights, *factors, *biases) if t is not None]

    def oriented(weights):
        return [w.mT for w in weights] if transposed else weights

    order, offsets = submodule("ops.routing").sort_by_expert(index, shape.experts)
    spec = submodule("ops.activation").Gate(**gate)
    forward = submodule("ops.experts.op").experts_forward
    inputs = (x, *oriented(bases), routing_weights, *factors, *biases, order, offsets, *spec, sentinels)
    out, *_ = forward(*inputs, True)
    with torch.no_grad():
        unkept, *kept = forward(*inputs, False)
    # Checkpointing runs the forward first without what the backward needs, then with it.
    assert torch.equal(unkept, out)
    assert not any(t.numel() for t in kept)
    got = [out, *torch.autograd.grad(out, leaves, grad)]

    def reference(dtype: torch.dtype) -> list[torch.Tensor]:
        def fresh(t):
            return None if t is None else t.detach().to(dtype).requires_grad_()

        inputs = [x, *bases, routing_weights, *factors, *biases]
        own_x, up, down, weights, *others = map(fresh, inputs)
        result = submodule("ops.experts.reference").experts(
            own_x, *oriented([up, down]), index, weights, *others[:4], spec, *others[4:]
        )
        own = [t for t in (own_x, up, down, weights, *others) if t is not None]
        return [result, *torch.autograd.grad(result, own, grad.to(dtype))]

    assert_close(got, reference(torch.float64), 3e-5, reference(torch.float32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_gates_biases_and_orientations_match_the_reference(submodule, gate, transposed) -> None:
    # The interpreter runs each program in numpy, one after the other.
    for shape in AWKWARD[:2] if INTERPRETED else AWKWARD:
        assert_experts_match(submodule, shape, GATES[gate], transposed, True, True, False)


SIDE = st.sampled_from([16, 32, 64])


@given(
    shape=st.builds(
        Shape,
        tokens=st.integers(1, 16),
        experts=st.integers(2, 5),
        top_k=st.integers(1, 2),
        hidden=st.integers(1, 40),
        intermediate=st.integers(1, 36),
        rank=st.integers(1, 18),
    ),
    gate=st.sampled_from(sorted(GATES)),
    transposed=st.booleans(),
    biased=st.booleans(),
    adapted=st.booleans(),
    sentinels=st.booleans(),
    blocks=st.none() | st.tuples(SIDE, SIDE, SIDE) if INTERPRETED else st.none(),
)
def test_any_layout_of_any_shape(
    submodule, shape, gate, transposed, biased, adapted, sentinels, blocks
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if blocks is not None:
            m, n, k = blocks
            launches = {
                "grouped_matmul": {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 2},
                "grouped_outer": {"BLOCK_P": n, "BLOCK_Q": k, "BLOCK_S": m},
            }
            patch.setattr(submodule("ops.grouped_linear.gpu"), "tile", lambda name, *_: launches[name])
        assert_experts_match(submodule, shape, GATES[gate], transposed, biased, adapted, sentinels)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_pair", [False, True])
def test_grouped_linear_with_bias_matches_the_reference(kernel, submodule, transposed, per_pair) -> None:
    shape = AWKWARD[1]
    rows = (shape.tokens, shape.top_k) if per_pair else (shape.tokens,)
    x, bias = leaf(*rows, shape.hidden), leaf(shape.experts, shape.intermediate)
    stored = weight(shape.experts, shape.intermediate, shape.hidden, transposed)
    index = route(shape, sentinels=True)
    y = kernel.grouped_linear(x, stored.mT if transposed else stored, index, bias=bias)
    grad = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, (x, stored, bias), grad)]

    wide = [t.detach().double().requires_grad_() for t in (x, stored, bias)]
    effective = wide[1].mT if transposed else wide[1]
    exact = submodule("ops.grouped_linear.reference").grouped_linear(wide[0], effective, index, bias=wide[2])
    assert_close(got, [exact, *torch.autograd.grad(exact, wide, grad.double())], 2e-5)


def test_a_weight_that_is_stored_transposed_gets_its_gradient_in_that_layout(kernel) -> None:
    stored = weight(3, 8, 12, transposed=True)
    y = kernel.grouped_linear(torch.randn(5, 12), stored.mT, torch.randint(0, 3, (5, 2)))
    (gradient,) = torch.autograd.grad(y.sum(), stored)
    assert gradient.is_contiguous()


def test_nan_passes_through_a_clamped_gate(submodule) -> None:
    gate = submodule("ops.activation").Gate(**GATES["gpt-oss"])
    order, offsets = submodule("ops.routing").sort_by_expert(torch.zeros(2, 1, dtype=torch.long), 1)
    x = torch.tensor([[float("nan")], [1.0]])
    arguments = (x, torch.ones(1, 2, 1), torch.ones(1, 1, 1), torch.ones(2, 1), *[None] * 6)
    out, *_ = submodule("ops.experts.op").experts_forward(*arguments, order, offsets, *gate, False, False)
    assert out.isnan().tolist() == [[True], [False]]


def test_nan_reaches_the_gradients_that_it_reaches_without_fusion(submodule) -> None:
    gate = submodule("ops.activation").Gate(**GATES["gpt-oss"])
    index = torch.zeros(1, 1, dtype=torch.long)
    order, offsets = submodule("ops.routing").sort_by_expert(index, 1)
    bias = torch.randn(1, 10)
    # Of two gates and of one factor; and a gate and a factor that no number is above.
    bias[0, [1, 2, 7]], bias[0, [3, 9]] = float("nan"), float("inf")
    bias.requires_grad_()
    x, up, down, weights = torch.randn(1, 3), torch.randn(1, 10, 3), torch.randn(1, 3, 5), torch.ones(1, 1)
    arguments = (x, up, down, weights, *[None] * 4, bias, None)
    out, *_ = submodule("ops.experts.op").experts_forward(*arguments, order, offsets, *gate, False, True)
    reference = submodule("ops.experts.reference").experts
    exact = reference(x, up, down, index, weights, *[None] * 4, gate, bias)
    got, expected = (torch.autograd.grad(result.sum(), bias)[0] for result in (out, exact))
    assert got.isfinite().tolist() == expected.isfinite().tolist()
    torch.testing.assert_close(got, expected, equal_nan=True)
