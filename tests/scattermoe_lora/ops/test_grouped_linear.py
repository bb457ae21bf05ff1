"""The public building block, against the float64 reference. Runs natively, and in Triton's interpreter."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import AWKWARD, INTERPRETED, Shape, assert_close, error, low_rank, route
from hypothesis import Phase, given, settings
from hypothesis import strategies as st


def leaves(shape: Shape, per_pair: bool, sentinels: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    a, b = low_rank(shape.experts, shape.intermediate, shape.hidden, shape.rank)
    weight = torch.randn(shape.experts, shape.intermediate, shape.hidden) * shape.hidden**-0.5
    rows = (shape.tokens, shape.top_k) if per_pair else (shape.tokens,)
    return [t.requires_grad_() for t in (torch.randn(*rows, shape.hidden), weight, a, b)], route(
        shape, sentinels
    )


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
@pytest.mark.parametrize(("per_pair", "sentinels"), [(False, True), (True, False)])
def test_output_and_gradients_match_the_reference(kernel, submodule, shape, per_pair, sentinels) -> None:
    (x, weight, a, b), index = leaves(shape, per_pair, sentinels)
    y = kernel.grouped_linear(x, weight, index, a, b, scaling=0.75)
    grad = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, (x, weight, a, b), grad)]

    wide = [t.detach().double().requires_grad_() for t in (x, weight, a, b)]
    reference = submodule("ops.grouped_linear.reference").grouped_linear(
        wide[0], wide[1], index, wide[2], 0.75 * wide[3]
    )
    assert_close(got, [reference, *torch.autograd.grad(reference, wide, grad.double())], 2e-5)


@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    n_in=st.integers(1, 40),
    n_out=st.integers(1, 40),
)
def test_any_shape_without_factors(kernel, submodule, tokens, experts, top_k, n_in, n_out) -> None:
    index = torch.randint(0, experts + 1, (tokens, top_k))
    x, weight = torch.randn(tokens, n_in), torch.randn(experts, n_out, n_in)
    reference = submodule("ops.grouped_linear.reference").grouped_linear(x.double(), weight.double(), index)
    assert_close([kernel.grouped_linear(x, weight, index)], [reference], 2e-5)


def test_strided_and_expanded_inputs_are_handled(kernel, submodule) -> None:
    index = torch.randint(0, 3, (5, 2))
    x = torch.randn(1, 12).expand(5, 12)
    weight = torch.randn(12, 8, 3).permute(2, 1, 0)
    reference = submodule("ops.grouped_linear.reference").grouped_linear(x.double(), weight.double(), index)
    assert_close([kernel.grouped_linear(x, weight, index)], [reference], 2e-5)


def far(*shape: int) -> torch.Tensor:
    """Random float16, its last row or matrix 2^31 elements behind the first: 4 GB of addresses, a few pages touched."""
    stride = (1 << 31) // (shape[0] - 1)
    memory = torch.empty((1 << 31) + torch.Size(shape[1:]).numel(), dtype=torch.float16)
    contiguous = torch.empty(shape[1:], device="meta").stride()
    return memory.as_strided(shape, (stride, *contiguous)).copy_(torch.randn(shape))


def test_rows_and_weights_stand_beyond_two_to_the_31_elements(submodule) -> None:
    op, experts = submodule("ops.grouped_linear.op"), submodule("ops.experts.op")
    index = torch.tensor([[2], [0], [1]])
    routing = submodule("ops.routing").sort_by_expert(index, 3)
    gate = submodule("ops.activation").Gate("silu")
    x, dy, weight, down = far(3, 16), far(3, 8), far(3, 8, 16), far(3, 16, 4)
    a, b, low = far(3, 2, 16), far(3, 8, 2), far(3, 2)
    results = []
    for near in (False, True):
        own = [
            t.clone(memory_format=torch.contiguous_format) if near else t
            for t in (x, dy, weight, down, a, b, low)
        ]
        own_x, own_dy, own_weight, own_down, own_a, own_b, own_low = own
        product = (own_x, own_weight, own_a, own_b, None)
        layer = (own_x, own_weight, own_down, torch.ones(3, 1), own_a, own_b, None, None, None, None)
        results.append(
            [
                *op.grouped_linear_forward(*product, *routing, 1, False),
                *op.grouped_linear_backward(
                    own_dy, *product, *routing, own_low.contiguous(), 1, [True, True, True, True, False]
                ),
                *experts.experts_forward(*layer, *routing, *gate, False, True),
            ]
        )
    for from_far, from_near in zip(*results, strict=True):
        assert torch.equal(from_far, from_near)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_dtypes(kernel, dtype) -> None:
    index = torch.tensor([[0, 1]], dtype=dtype)
    assert kernel.grouped_linear(torch.ones(1, 4), torch.ones(2, 3, 4), index).tolist() == [[[4.0] * 3] * 2]


def test_only_the_gradients_asked_for_are_computed(kernel) -> None:
    (x, weight, a, b), index = leaves(AWKWARD[1], False, False)
    frozen = weight.detach()
    kernel.grouped_linear(x, frozen, index, a, b).sum().backward()
    assert frozen.grad is None
    assert all(t.grad is not None for t in (x, a, b))


X, WEIGHT, INDEX = torch.zeros(5, 8), torch.zeros(3, 6, 8), torch.zeros(5, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, WEIGHT, INDEX.float()), "expert_index: expected [T, K] of int32 or int64"),
        ((X, WEIGHT, INDEX[0]), "expert_index: expected [T, K]"),
        ((X, WEIGHT[0], INDEX), "weight: expected [E, N_out, N_in], got [6, 8]"),
        ((X[:, :7], WEIGHT, INDEX), "x: expected shape [5, 8], got [5, 7]"),
        ((X[:4], WEIGHT, INDEX), "x: expected shape [5, 8], got [4, 8]"),
        (
            (X.long(), WEIGHT.long(), INDEX),
            "x: expected float64, float32, bfloat16 or float16, got torch.int64",
        ),
        ((X, WEIGHT.double(), INDEX), "weight: expected dtype of x, torch.float32, got torch.float64"),
        ((X, WEIGHT, INDEX, torch.zeros(3, 2, 8)), "lora_a and lora_b are given together"),
        (
            (X, WEIGHT, INDEX, torch.zeros(3, 0, 8), torch.zeros(3, 6, 0)),
            "lora_a: expected [E, r, N_in] with r >= 1",
        ),
        ((X, WEIGHT, INDEX, torch.zeros(3, 2, 9), torch.zeros(3, 6, 2)), "lora_a: expected shape [3, 2, 8]"),
        ((X, WEIGHT, INDEX, torch.zeros(3, 2, 8), torch.zeros(3, 2, 6)), "lora_b: expected shape [3, 6, 2]"),
        ((X, WEIGHT.to("meta"), INDEX), "weight: expected device cpu, got meta"),
        ((X, WEIGHT, INDEX - 1), "expert_index: expected values >= 0, got 10 negative ones"),
    ],
)
def test_bad_input_names_argument_expected_and_got(kernel, arguments, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.grouped_linear(*arguments)


if INTERPRETED:
    SIDE = st.sampled_from([16, 32, 64])

    # Without shrinking, which takes minutes in the interpreter.
    @settings(phases=[Phase.explicit, Phase.reuse, Phase.generate])
    @given(
        blocks=st.tuples(SIDE, SIDE, SIDE),
        group=st.sampled_from([1, 2, 3, 8]),
        tokens=st.integers(1, 70),
        experts=st.integers(1, 9),
        sizes=st.tuples(st.integers(1, 100), st.sampled_from([16, 64, 70, 128])),
        rank=st.integers(1, 40),
    )
    def test_any_blocks(kernel, submodule, blocks, group, tokens, experts, sizes, rank) -> None:
        n_out, n_in = sizes
        top_k = min(2, experts)
        index = torch.rand(tokens, experts + 1).topk(top_k).indices
        shapes = ((tokens, n_in), (experts, n_out, n_in), (experts, rank, n_in), (experts, n_out, rank))
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

        with pytest.MonkeyPatch.context() as patch:
            m, n, k = blocks
            matmul = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group}
            outer = {"BLOCK_P": n, "BLOCK_Q": k, "BLOCK_S": m}
            patch.setattr(
                submodule("ops.grouped_linear.gpu"),
                "tile",
                lambda name, *_: matmul if name == "grouped_matmul" else outer,
            )
            y = kernel.grouped_linear(leaves[0], leaves[1], index, leaves[2], leaves[3])
            grad = torch.randn_like(y)
            got = [y, *torch.autograd.grad(y, leaves, grad)]

        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        exact = submodule("ops.grouped_linear.reference").grouped_linear(wide[0], wide[1], index, *wide[2:])
        for g, e in zip(got, [exact, *torch.autograd.grad(exact, wide, grad.double())], strict=True):
            assert error(g, e) < 2e-5
