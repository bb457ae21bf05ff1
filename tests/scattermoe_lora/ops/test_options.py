"""Launch options of the grouped products: each computes what the reference computes, whatever the shape.

Only Triton launches have options, so most of this runs in Triton's interpreter and on a GPU alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import AWKWARD, TRITON, Shape, assert_close, low_rank, route

OPTIONS = {
    "schedule": {"SCHEDULE": 1, "GATE_BACKWARD": 1},
    "tma": {"TMA": 1, "TMA_ROWS": 1},
    "persistent": {"PERSISTENT": 3},
    "persistent, flat, tma": {"PERSISTENT": 2, "FLATTEN": 1, "TMA": 1, "TMA_ROWS": 1},
    "library, schedule": {"LIBRARY": 1, "SCHEDULE": 1},
    "own sort and sums": {},
}
# One test has what torch multiplies: most shapes of the others are not.
OWN_PRODUCTS = [option for option in OPTIONS if option != "library, schedule"]
MATMUL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2}
OUTER = {"BLOCK_P": 16, "BLOCK_Q": 32, "BLOCK_S": 16}
# Kernels that stand in for torch's where a table has a rule for them.
OWN = {"sort_pairs": {"BLOCK": 32}, "sum_choices": {"BLOCK": 16}}
# More rows an expert, columns and ranks than a block has. What a copying unit reads in place is a multiple of 16 bytes.
WIDE = Shape(tokens=27, experts=3, top_k=2, hidden=34, intermediate=18, rank=33)
ALIGNED = Shape(tokens=27, experts=3, top_k=2, hidden=36, intermediate=20, rank=20)


@pytest.fixture
def launched(submodule):
    """``with launched(option):`` all products are launched with the option."""
    gpu, pairs = submodule("ops.grouped_linear.gpu"), submodule("ops.grouped_linear.pairs")

    @contextmanager
    def launch(option: Mapping[str, int]) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                gpu, "tile", lambda name, *_: {**MATMUL, **option} if name == "grouped_matmul" else OUTER
            )
            if not option:
                patch.setattr(pairs, "own_launch", lambda name, *_: OWN[name])
            yield

    return launch


def layer(
    submodule: Any,
    shape: Shape,
    index: torch.Tensor,
    gate: Any,
    *,
    transposed: bool,
    factors: bool,
    bias: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients of a layer by the operator, and by the reference in float64."""
    op, arguments = submodule("ops.experts.op"), submodule("ops.experts.arguments")
    experts, hidden, width = shape.experts, shape.hidden, shape.intermediate

    def weight(n_out: int, n_in: int) -> torch.Tensor:
        values = torch.randn(experts, n_out, n_in) * n_in**-0.5
        return values.mT.contiguous().mT if transposed else values

    x, weights = torch.randn(shape.tokens, hidden), torch.rand(shape.tokens, shape.top_k)
    up, down = weight(2 * width, hidden), weight(hidden, width)
    pairs = (
        low_rank(experts, n_out, n_in, shape.rank) if factors else (None, None)
        for n_out, n_in in ((2 * width, hidden), (hidden, width))
    )
    biases = (torch.randn(experts, 2 * width), torch.randn(experts, hidden)) if bias else (None, None)
    tensors = [x, up, down, weights, *(factor for pair in pairs for factor in pair), *biases]
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    routing = submodule("ops.routing").sort_by_expert(index, experts)
    out, *_ = op.experts_forward(*arguments.Operands(*leaves, *routing), *gate, True, True)
    grad = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]

    x, up, down, weights, a1, b1, a2, b2, *biases = wide = [
        t if t is None else t.detach().double().requires_grad_() for t in leaves
    ]
    reference = submodule("ops.experts.reference").experts
    exact = reference(x, up, down, index, weights, a1, b1, a2, b2, gate, *biases)
    trained = [t for t in wide if t is not None]
    return got, [exact, *torch.autograd.grad(exact, trained, grad.double())]


def test_a_descriptor_serves_what_the_hardware_copies(submodule) -> None:
    describe = submodule("ops.grouped_linear.descriptors").describe
    weight = torch.empty(3, 48, 16, dtype=torch.bfloat16)

    def along(weight: torch.Tensor, parts: int = 1) -> str:
        descriptor, dimension = describe(weight, parts, 32, 16)
        assert (descriptor is weight) == (dimension == "")
        return dimension

    assert [along(weight), along(weight.mT), along(weight, 2), along(weight.mT, 2)] == ["K", "N", "K", ""]
    # Rows of 8 bytes, an address 2 bytes behind a multiple of 16, no dimension that is contiguous, one expert for all.
    assert along(weight[..., :4].contiguous()) == ""
    assert along(torch.empty(3 * 48 * 16 + 1, dtype=torch.bfloat16)[1:].view(3, 48, 16)) == ""
    assert along(weight[..., ::2]) == ""
    assert along(weight[:1].expand(3, 48, 16)) == ""


def test_torch_multiplies_what_it_can_in_one_launch(submodule) -> None:
    serves = submodule("ops.grouped_linear.library").serves
    x, weight = torch.empty(5, 16, dtype=torch.bfloat16), torch.empty(3, 48, 16, dtype=torch.bfloat16)
    assert serves(x, weight)
    assert serves(x[:, :48].expand(5, 16), weight)
    assert serves(torch.empty(5, 48, dtype=torch.bfloat16), weight.mT)
    # Of rows of 8 bytes, of an address 2 bytes behind a multiple of 16, of no dimension that is contiguous.
    assert not serves(x[:, :4].contiguous(), weight[..., :4].contiguous())
    assert not serves(x, torch.empty(3 * 48 * 16 + 1, dtype=torch.bfloat16)[1:].view(3, 48, 16))
    assert not serves(x[:, ::2], weight[..., ::2])
    # More experts than its kernel counts, and on a GPU other types than bfloat16, one expert after another.
    assert not serves(x, weight[:1].expand(1024, 48, 16))
    on_gpu = [t.to("meta") for t in (x, weight)]
    assert not serves(*(t.half() for t in on_gpu))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_torch_multiplies_the_rows_of_each_expert(submodule, transposed, top_k) -> None:
    library, sort = submodule("ops.grouped_linear.library"), submodule("ops.routing").sort_by_expert
    index = torch.tensor([[2, 0], [2, 3], [0, 1]])
    routing, weight = sort(index, 3), torch.randn(3, 32, 16).bfloat16()
    weight = weight.mT.contiguous().mT if transposed else weight
    rows = {None: 6, 1: 6, 2: 3}[top_k]
    x = torch.randn(rows, 16).bfloat16()
    y = library.product(x, weight, routing, top_k)
    taken = x if top_k is None else x[routing.order // top_k]
    for expert, (begin, end) in enumerate(itertools.pairwise(routing.offsets.tolist())):
        assert_close([y[begin:end]], [taken[begin:end].double() @ weight[expert].double().T], 1e-2)


if TRITON:

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("gate", [("silu",), ("silu", True, 1.702, 7.0, 1.0)], ids=["silu", "gpt-oss"])
    def test_torch_does_the_four_wide_products_of_a_layer(
        submodule, launched, monkeypatch, gate, transposed
    ) -> None:
        library = submodule("ops.grouped_linear.library")
        served, product = [], library.product
        monkeypatch.setattr(
            library,
            "product",
            lambda x, weight, *rest: served.append(tuple(weight.shape[1:])) or product(x, weight, *rest),
        )
        shape = Shape(tokens=21, experts=4, top_k=2, hidden=48, intermediate=32, rank=3)
        gate = submodule("ops.activation").Gate(*gate)
        # Of a table's rule for wide products: a rank's columns are few.
        only_wide = mock.patch.object(library, "serves", lambda x, weight: min(weight.shape[1:]) > 3)
        with launched(OPTIONS["library, schedule"]), only_wide:
            got, exact = layer(
                submodule, shape, route(shape, True), gate, transposed=transposed, factors=True, bias=True
            )
        assert served == [(64, 48), (48, 32), (32, 48), (48, 64)]
        assert_close(got, exact, 2e-5)

    @pytest.mark.parametrize("option", OWN_PRODUCTS)
    @pytest.mark.parametrize(
        ("shape", "sentinels"),
        list(zip((*AWKWARD[:4], WIDE), (False, True, False, True, True), strict=True)),
        ids=str,
    )
    def test_a_layer_matches_the_reference(submodule, launched, shape, sentinels, option) -> None:
        gate = submodule("ops.activation").Gate("silu")
        with launched(OPTIONS[option]):
            got, exact = layer(
                submodule, shape, route(shape, sentinels), gate, transposed=False, factors=True, bias=False
            )
        assert_close(got, exact, 2e-5)

    @pytest.mark.parametrize("option", OWN_PRODUCTS)
    @pytest.mark.parametrize("factors", [False, True])
    def test_transposed_weights_with_biases_match_the_reference(submodule, launched, factors, option) -> None:
        gate = submodule("ops.activation").Gate("silu", True, 1.702, 1.0, 1.0)
        with launched(OPTIONS[option]):
            got, exact = layer(
                submodule, ALIGNED, route(ALIGNED), gate, transposed=True, factors=factors, bias=True
            )
        assert_close(got, exact, 2e-5)

    @pytest.mark.parametrize("option", OPTIONS)
    def test_all_tokens_on_one_expert_match_the_reference(submodule, launched, option) -> None:
        shape = Shape(tokens=40, experts=4, top_k=1, hidden=24, intermediate=16, rank=4)
        gate = submodule("ops.activation").Gate("gelu_tanh")
        with launched(OPTIONS[option]):
            got, exact = layer(
                submodule,
                shape,
                torch.full((40, 1), 2),
                gate,
                transposed=False,
                factors=True,
                bias=False,
            )
        assert_close(got, exact, 2e-5)

    @pytest.mark.parametrize("option", OPTIONS)
    @pytest.mark.parametrize("per_pair", [False, True])
    def test_a_linear_matches_the_reference(kernel, submodule, launched, per_pair, option) -> None:
        shape = WIDE
        a, b = low_rank(shape.experts, shape.intermediate, shape.hidden, shape.rank)
        weight = torch.randn(shape.experts, shape.intermediate, shape.hidden)
        x = torch.randn(shape.tokens, *((shape.top_k,) if per_pair else ()), shape.hidden)
        index = route(shape, True)
        leaves = [t.requires_grad_() for t in (x, weight, a, b)]
        with launched(OPTIONS[option]):
            y = kernel.grouped_linear(x, weight, index, a, b)
            grad = torch.randn_like(y)
            got = [y, *torch.autograd.grad(y, leaves, grad)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        exact = submodule("ops.grouped_linear.reference").grouped_linear(wide[0], wide[1], index, *wide[2:])
        assert_close(got, [exact, *torch.autograd.grad(exact, wide, grad.double())], 2e-5)

    @pytest.mark.parametrize("option", OPTIONS)
    def test_equal_calls_give_equal_bits_with(submodule, launched, option) -> None:
        gate, results = submodule("ops.activation").Gate("silu"), []
        shape = Shape(tokens=6, experts=3, top_k=2, hidden=20, intermediate=12, rank=3)
        index = route(shape, True)
        for _ in range(2):
            torch.manual_seed(1)
            with launched(OPTIONS[option]):
                results.append(
                    layer(submodule, shape, index, gate, transposed=False, factors=True, bias=True)[0]
                )
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)

    def test_one_launch_gives_the_gradients_through_a_gate_the_bits_of_two(
        submodule, launched, monkeypatch
    ) -> None:
        gpu, schedule = submodule("ops.experts.gpu"), submodule("ops.grouped_linear.schedule")
        # Clamped, for NaN and infinity to be stopped; columns that end within a tile and within a quarter of one.
        gate = submodule("ops.activation").Gate("silu", False, 1.702, 1.0, 1.0)
        shape = Shape(tokens=27, experts=3, top_k=2, hidden=34, intermediate=45, rank=33)
        pairs, width = shape.tokens * shape.top_k, shape.intermediate
        routing = submodule("ops.routing").sort_by_expert(route(shape, True), shape.experts)
        a, _ = low_rank(shape.experts, shape.hidden, width, shape.rank)
        low = torch.randn(pairs, shape.rank), a.mT
        hidden = torch.randn(pairs, 2 * width)
        hidden[3, :2], hidden[4, width] = torch.tensor([float("nan"), float("inf")]), float("-inf")
        down = torch.randn(shape.experts, shape.hidden, width)
        rest = hidden, torch.rand(pairs), gate
        grad, results = torch.randn(shape.tokens, shape.hidden), []
        for option in ({"SCHEDULE": 1}, OPTIONS["schedule"]):
            with launched(option):
                scheduled = schedule.Scheduled(*routing)
                results.append(gpu.gate_gradients(grad, down, scheduled, shape.top_k, low, *rest))
            monkeypatch.setattr(gpu, "_gate_backward", None)
        two, one = results
        assert all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(two[:2], one[:2], strict=True)
        )
        torch.testing.assert_close(one[2], two[2], equal_nan=True, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("counts", [[0, 5, 16, 0, 33, 1], [7], [0, 0, 0], [300, 0, 2, 4]], ids=str)
    @pytest.mark.parametrize("without_expert", [0, 1, 40])
    def test_any_shape_of_a_schedule_lists_every_row_once(submodule, counts, without_expert) -> None:
        experts, block = len(counts), 16
        index = torch.repeat_interleave(
            torch.arange(experts + 1), torch.tensor([*counts, without_expert])
        ).view(-1, 1)
        if not len(index):
            return
        routing = submodule("ops.routing").sort_by_expert(index, experts)
        ends = [*routing.offsets.tolist()[1:], len(index)]
        for size in {experts, 2, 1} - {2 * (experts == 1)}:
            schedules = submodule("ops.grouped_linear.schedule").tile_schedules(routing, block, size)
            assert len(schedules) == -(-experts // size)
            for share, (header, *tiles) in enumerate(schedules.tolist()):
                first, expected = share * size, []
                after = first + size if first + size < experts else experts + 1
                for segment in range(first, after):
                    number = size if segment == experts else segment - first
                    for row in range(ends[segment - 1] if segment else 0, ends[segment], block):
                        expected.append([number, row, ends[segment]])
                assert tiles[: len(expected)] == expected
                assert all(row >= end for _, row, end in tiles[len(expected) :])
                assert header[:2] == [sum(number < size for number, *_ in expected), len(expected)]

    def test_launches_of_a_call_share_their_schedules_with_one_expert_or_more(
        submodule, launched, monkeypatch
    ) -> None:
        schedule = submodule("ops.grouped_linear.schedule")
        asked, make = [], schedule.tile_schedules
        monkeypatch.setattr(
            schedule, "tile_schedules", lambda *arguments: asked.append(arguments[1:]) or make(*arguments)
        )
        gate = submodule("ops.activation").Gate("silu")
        with launched(OPTIONS["schedule"]):
            layer(submodule, AWKWARD[1], route(AWKWARD[1]), gate, transposed=False, factors=True, bias=True)
        # Once in the forward, once in the backward.
        assert asked == [(MATMUL["BLOCK_M"], AWKWARD[1].experts)] * 2

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize("block", [16, 64])
    @pytest.mark.parametrize("shape", [(1, 1), (1, 3), (40, 2), (33, 4), (130, 1), (0, 2)], ids=str)
    def test_any_shape_is_sorted_as_torch_sorts_it(submodule, monkeypatch, shape, block, dtype) -> None:
        pairs, sort = submodule("ops.grouped_linear.pairs"), submodule("ops.routing").sort_by_expert
        for experts in (1, 5, 31):
            # Sentinels behind the experts, and far behind them.
            index = torch.randint(0, experts + 2, shape, dtype=dtype)
            index[index > experts] = 1000
            by_torch = sort(index, experts)
            with monkeypatch.context() as patch:
                patch.setattr(pairs, "own_launch", lambda *_: {"BLOCK": block})
                ours = sort(index, experts)
            ends = by_torch.offsets[-1]
            assert torch.equal(ours.offsets, by_torch.offsets)
            assert torch.equal(ours.order[:ends], by_torch.order[:ends])
            # Sentinels stand in any order of their indices.
            assert ours.order[ends:].tolist() == sorted(by_torch.order[ends:].tolist())

    def test_negative_indices_have_no_expert_where_any_shape_is_sorted(submodule, monkeypatch) -> None:
        monkeypatch.setattr(submodule("ops.grouped_linear.pairs"), "own_launch", lambda *_: {"BLOCK": 16})
        routing = submodule("ops.routing").sort_by_expert(torch.tensor([[1, -1], [0, 1]]), 2)
        assert routing.order.tolist() == [2, 0, 3, 1]
        assert routing.offsets.tolist() == [0, 1, 3]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 70), (4, 11, 16), (0, 2, 8)], ids=str)
    def test_choices_of_any_shape_are_summed(submodule, monkeypatch, sizes, dtype) -> None:
        pairs = submodule("ops.grouped_linear.pairs")
        tokens, top_k, columns = sizes
        by_pair = torch.randn(tokens * top_k, columns).to(dtype)
        monkeypatch.setattr(pairs, "own_launch", lambda *_: {"BLOCK": 32})
        got = pairs.sum_choices(by_pair, tokens)
        exact = by_pair.double().view(tokens, top_k, columns).sum(dim=1)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_nan_in_another_experts_weight_is_not_in_the_results_of_one_expert(
        submodule, launched, transposed
    ) -> None:
        # Neither a tile's columns nor the terms of its sums end where the expert's do.
        gpu, values = submodule("ops.grouped_linear.gpu"), torch.randn(3, 40, 20)
        values[[0, 2]] = float("nan")
        weight = values.mT.contiguous().mT if transposed else values
        routing = submodule("ops.routing").sort_by_expert(torch.ones(5, 1, dtype=torch.int64), 3)
        x, taken, describe = torch.randn(5, 20), [], gpu.describe
        with launched(OPTIONS["tma"]), pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, "describe", lambda *sizes: taken.append(describe(*sizes)) or taken[-1])
            y = gpu.grouped_matmul(x, weight, routing)
        assert [along for _, along in taken] == ["N" if transposed else "K"]
        assert_close([y], [x.double() @ values[1].double().T], 2e-5)
