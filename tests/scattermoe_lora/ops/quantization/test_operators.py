"""The operators with quantized weights, against float64 on the decoded ones. Runs in Triton's interpreter, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocations import Allocations
from bits import FORMATS, make_stack
from helpers import AWKWARD, INTERPRETED, TRITON, Shape, assert_close, low_rank, route

# Two experts with few rows, one with none, sizes that are no powers of two; more experts than a workspace holds; and
# more of them than pairs.
SMALL = Shape(tokens=7, experts=5, top_k=2, hidden=38, intermediate=20, rank=3)
MANY = Shape(tokens=5, experts=18, top_k=3, hidden=32, intermediate=16, rank=4)
FEW = Shape(tokens=3, experts=33, top_k=1, hidden=30, intermediate=12, rank=2)

LAUNCHES = {
    "grouped_matmul": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2},
    "grouped_outer": {"BLOCK_P": 16, "BLOCK_Q": 32, "BLOCK_S": 16},
}


@pytest.fixture
def into_a_workspace(submodule, monkeypatch) -> Any:
    """Call it, and Triton's products decode into a workspace however few rows an expert has."""
    return lambda: TRITON and monkeypatch.setattr(submodule("ops.grouped_linear.few_rows"), "FEW", 0)


def decoded(quantization: Any, weight: Any) -> torch.Tensor:
    dense = weight if isinstance(weight, torch.Tensor) else quantization("reference").decode(weight)
    return dense.detach().double()


def operands(submodule: Any, shape: Shape, index: torch.Tensor, up: Any, down: Any, biased: bool) -> Any:
    """Operands of a layer, all but the quantized weights with a gradient."""
    experts, hidden, width = shape.experts, shape.hidden, shape.intermediate
    factors = [
        *low_rank(experts, 2 * width, hidden, shape.rank),
        *low_rank(experts, hidden, width, shape.rank),
    ]
    biases = [torch.randn(experts, 2 * width), torch.randn(experts, hidden)] if biased else [None, None]
    tensors = [
        torch.randn(shape.tokens, hidden),
        up,
        down,
        torch.rand(shape.tokens, shape.top_k),
        *factors,
        *biases,
    ]
    leaves = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in tensors]
    routing = submodule("ops.routing").sort_by_expert(index, experts)
    return submodule("ops.experts.arguments").Operands(*leaves, *routing)


def assert_layer_matches(
    submodule: Any, quantization: Any, layer: Any, index: torch.Tensor, gate: Any
) -> None:
    leaves = [t for t in layer[:-2] if isinstance(t, torch.Tensor)]
    out, *_ = submodule("ops.experts.op").experts(layer, gate, True, True)
    grad = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, leaves, grad)]
    wide = [None if t is None else decoded(quantization, t).requires_grad_() for t in layer[:-2]]
    x, up, down, weights, a1, b1, a2, b2, *biases = wide
    exact = submodule("ops.experts.reference").experts(
        x, up, down, index, weights, a1, b1, a2, b2, gate, *biases
    )
    trained = [w for w, t in zip(wide, layer[:-2], strict=True) if isinstance(t, torch.Tensor)]
    assert_close(got, [exact, *torch.autograd.grad(exact, trained, grad.double())], 2e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["nested nf4", "mxfp4", "float8 blocks"] if INTERPRETED else FORMATS)
def test_a_layer_of_every_format_matches_the_reference(submodule, quantization, kind, transposed) -> None:
    # As gpt-oss has it where transposed: biases, an interleaved and clamped gate.
    shape, index = SMALL, route(SMALL, True)
    index[index == 3] = 1
    up = make_stack(quantization, kind, shape.experts, 2 * shape.intermediate, shape.hidden, transposed)
    down = make_stack(quantization, kind, shape.experts, shape.hidden, shape.intermediate, transposed)
    gate = submodule("ops.activation").Gate("silu", transposed, 1.5, 2.0, 1.0)
    layer = operands(submodule, shape, index, up, down, transposed)
    assert_layer_matches(submodule, quantization, layer, index, gate)


@pytest.mark.parametrize("shape", [AWKWARD[0], AWKWARD[3], MANY, FEW], ids=str)
@pytest.mark.parametrize("one_expert", [False, True])
def test_a_layer_of_awkward_shape_matches_the_reference(
    submodule, quantization, shape, one_expert, into_a_workspace
) -> None:
    if one_expert:
        into_a_workspace()
    index = torch.full((shape.tokens, 1), shape.experts - 1) if one_expert else route(shape, shape is FEW)
    up = make_stack(quantization, "nf4", shape.experts, 2 * shape.intermediate, shape.hidden)
    down = make_stack(quantization, "float8 blocks", shape.experts, shape.hidden, shape.intermediate)
    layer = operands(submodule, shape, index, up, down, shape is FEW)
    if one_expert:
        layer = layer._replace(routing_weights=torch.rand(shape.tokens, 1).requires_grad_())
    assert_layer_matches(submodule, quantization, layer, index, submodule("ops.activation").Gate("gelu_tanh"))


@pytest.mark.parametrize(
    "option", [{"PERSISTENT": 2, "FLATTEN": 1, "TMA": 1}, {"SCHEDULE": 1}] if TRITON else [{}]
)
def test_a_layer_launched_with_options_matches_the_reference(
    submodule, quantization, option, monkeypatch, into_a_workspace
) -> None:
    into_a_workspace()
    if TRITON:
        launches = {**LAUNCHES, "grouped_matmul": {**LAUNCHES["grouped_matmul"], **option}}
        monkeypatch.setattr(submodule("ops.grouped_linear.gpu"), "tile", lambda name, *_: launches[name])
    shape, index = SMALL, route(SMALL, True)
    up = make_stack(quantization, "nf4", shape.experts, 2 * shape.intermediate, shape.hidden)
    down = make_stack(quantization, "nf4", shape.experts, shape.hidden, shape.intermediate)
    layer = operands(submodule, shape, index, up, down, True)
    assert_layer_matches(submodule, quantization, layer, index, submodule("ops.activation").Gate("silu"))


@pytest.mark.parametrize("quantized", ["gate_up", "down"])
def test_a_layer_with_one_dense_weight_matches_the_reference(submodule, quantization, quantized) -> None:
    shape, index = SMALL, route(SMALL)
    sizes = {"gate_up": (2 * shape.intermediate, shape.hidden), "down": (shape.hidden, shape.intermediate)}
    weights = {name: torch.randn(shape.experts, *size) / 5 for name, size in sizes.items()}
    weights[quantized] = make_stack(quantization, "nf4", shape.experts, *sizes[quantized])
    layer = operands(submodule, shape, index, weights["gate_up"], weights["down"], True)
    assert_layer_matches(submodule, quantization, layer, index, submodule("ops.activation").Gate("silu"))


@pytest.mark.parametrize("per_pair", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_matches_the_reference(kernel, submodule, quantization, per_pair, transposed) -> None:
    shape, index = SMALL, route(SMALL, True)
    kind = "float8 channels" if per_pair else "fp4"
    weight = make_stack(quantization, kind, shape.experts, shape.intermediate, shape.hidden, transposed)
    a, b = low_rank(shape.experts, shape.intermediate, shape.hidden, shape.rank)
    x = torch.randn(shape.tokens, *((shape.top_k,) if per_pair else ()), shape.hidden)
    leaves = [t.requires_grad_() for t in (x, a, b, torch.randn(shape.experts, shape.intermediate))]
    y = kernel.grouped_linear(leaves[0], weight, index, leaves[1], leaves[2], 0.5, leaves[3])
    grad = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, leaves, grad)]
    x, a, b, bias = wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = submodule("ops.grouped_linear.reference").grouped_linear(
        x, decoded(quantization, weight), index, a, 0.5 * b, bias
    )
    assert_close(got, [exact, *torch.autograd.grad(exact, wide, grad.double())], 2e-5)


@pytest.mark.parametrize("tokens", [1, 300])
def test_no_dense_stack_is_allocated(submodule, quantization, tokens) -> None:
    shape = Shape(tokens=tokens, experts=16, top_k=1, hidden=64, intermediate=32, rank=2)
    up = make_stack(quantization, "float8 blocks", shape.experts, 2 * shape.intermediate, shape.hidden)
    down = make_stack(quantization, "nf4", shape.experts, shape.hidden, shape.intermediate)
    layer = operands(submodule, shape, route(shape), up, down, False)
    layer = layer._make(t.detach() if isinstance(t, torch.Tensor) else t for t in layer)
    decode = quantization("reference").decode
    op, gate = submodule("ops.experts.op"), submodule("ops.activation").Gate("silu")
    kept = submodule("ops.experts.arguments").Kept
    names = ["x", "routing_weights", "gate_up_a", "gate_up_b", "down_a", "down_b"]

    def allocations(layer: Any) -> Allocations:
        implementation = op._implementation(layer.x)
        with Allocations() as watched:
            out, *rest = implementation.forward(layer, gate, True)
            implementation.backward(out, layer, kept(*rest), gate, names)
        return watched

    quantized, dense = allocations(layer), allocations(layer._replace(gate_up=decode(up), down=decode(down)))
    # A matrix of the 16 (four on a GPU), and what it is decoded through.
    stack = up.shape.numel() * 4
    if TRITON and tokens == 1:
        assert quantized.largest <= dense.largest
        stack = 0
    assert quantized.largest <= max(stack / (4 if TRITON else 8), dense.largest)
    assert quantized.peak <= dense.peak + stack / 3


def test_all_shares_of_a_layer_have_one_schedule_and_programs_for_what_they_have_on_average(
    submodule, quantization, monkeypatch, into_a_workspace
) -> None:
    if not TRITON:
        return
    into_a_workspace()
    schedule, gpu = submodule("ops.grouped_linear.schedule"), submodule("ops.grouped_linear.gpu")
    shape = Shape(tokens=96, experts=8, top_k=1, hidden=32, intermediate=16, rank=2)
    up = make_stack(quantization, "nf4", shape.experts, 2 * shape.intermediate, shape.hidden)
    down = make_stack(quantization, "nf4", shape.experts, shape.hidden, shape.intermediate)
    monkeypatch.setattr(gpu, "tile", lambda name, *_: LAUNCHES[name])
    scheduled, make = [], schedule.tile_schedules
    monkeypatch.setattr(
        schedule, "tile_schedules", lambda *arguments: scheduled.append(arguments[2]) or make(*arguments)
    )
    # All rows are one expert's, so that most programs of its share walk on and those of the others find none.
    index = torch.full((shape.tokens, 1), 5)
    layer = operands(submodule, shape, index, up, down, False)
    assert_layer_matches(submodule, quantization, layer, index, submodule("ops.activation").Gate("silu"))
    # Of two experts each: once in the forward, once in the backward.
    assert scheduled == [2, 2]
    routing = submodule("ops.routing").sort_by_expert(index, shape.experts)
    launches = [*gpu.launches(layer.x, up, routing, top_k=1, low=None)]
    of_average = schedule.most_tiles(2 * shape.tokens // shape.experts, 2, 16)
    assert [launch.programs for launch in launches] == 4 * [of_average]


def test_up_to_a_tile_of_rows_an_expert_decodes_as_it_reads(submodule, quantization) -> None:
    weight = make_stack(quantization, "mxfp4", 4, 8, 32)
    has_few_rows = submodule("ops.grouped_linear.few_rows").has_few_rows

    def routing(pairs: int) -> Any:
        return submodule("ops.routing").sort_by_expert(torch.zeros(pairs, 1, dtype=torch.int64), 4)

    assert has_few_rows(weight, routing(4 * 16))
    assert not has_few_rows(weight, routing(4 * 16 + 1))
    assert not has_few_rows(quantization("reference").decode(weight), routing(1))


def test_the_operators_pass_opcheck(submodule, quantization) -> None:
    if TRITON:
        return
    shape, index, gate = SMALL, route(SMALL), submodule("ops.activation").Gate("silu")
    linear, experts = submodule("ops.grouped_linear.op"), submodule("ops.experts.op")
    up = make_stack(quantization, "nested nf4", shape.experts, 2 * shape.intermediate, shape.hidden)
    down = torch.randn(shape.experts, shape.hidden, shape.intermediate)
    layer, meaning = operands(submodule, shape, index, up, down, True).take_apart()
    out, *kept = experts.experts_quantized_forward(*layer, *meaning, *gate, False, True)
    torch.library.opcheck(experts.experts_quantized_forward, (*layer, *meaning, *gate, False, True))

    def plain(values: Any) -> list[Any]:
        return [t.detach() if isinstance(t, torch.Tensor) else t for t in values]

    needs = [True, False] + [True] * 8
    arguments = (torch.randn_like(out), *plain(layer), *plain(kept), *meaning, *gate, needs)
    torch.library.opcheck(experts.experts_quantized_backward, arguments)

    single = submodule("ops.grouped_linear.arguments").Operands(
        layer.x, up, layer.gate_up_a, layer.gate_up_b, layer.gate_up_bias, layer.order, layer.offsets
    )
    single, meaning = single.take_apart()
    y, low = linear.grouped_linear_quantized_forward(*single, *meaning, shape.top_k, False)
    torch.library.opcheck(linear.grouped_linear_quantized_forward, (*single, *meaning, shape.top_k, False))
    needs = [True, False, True, True, True]
    arguments = (torch.randn_like(y), *plain(single), low.detach(), *meaning, shape.top_k, needs)
    torch.library.opcheck(linear.grouped_linear_quantized_backward, arguments)


def test_a_layer_compiles_to_one_graph(submodule, quantization) -> None:
    shape, index = SMALL, route(SMALL)
    up = make_stack(quantization, "nf4", shape.experts, 2 * shape.intermediate, shape.hidden)
    down = make_stack(quantization, "float8 blocks", shape.experts, shape.hidden, shape.intermediate)
    layer = operands(submodule, shape, index, up, down, False)
    op, gate = submodule("ops.experts.op"), submodule("ops.activation").Gate("silu")
    stack = quantization("stack").QuantizedStack

    def run(x: torch.Tensor, codes: torch.Tensor, scales: list[torch.Tensor]) -> torch.Tensor:
        weight = stack(codes, tuple(scales), up.format, torch.float32)
        return op.experts(layer._replace(x=x, gate_up=weight), gate, False, True)[0]

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        x = layer.x.detach().requires_grad_()
        out = function(x, up.codes, list(up.scales))
        results.append([out, *torch.autograd.grad(out.sum(), [x, layer.down_a])])
    assert_close(*results, 1e-6)


def test_a_scale_that_requires_a_gradient_is_refused(kernel, quantization) -> None:
    weight = make_stack(quantization, "nf4", 3, 8, 16)
    weight.scales[0].requires_grad_()
    with pytest.raises(
        NotImplementedError, match=r"weight: a quantized weight is frozen, .*; train low-rank"
    ):
        kernel.grouped_linear(torch.randn(2, 16), weight, torch.zeros(2, 1, dtype=torch.long))


def test_a_stack_is_checked_like_a_dense_weight(kernel, quantization) -> None:
    weight, index = make_stack(quantization, "nf4", 3, 8, 16), torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"x: expected shape \[2, 16\], got \[2, 8\]"):
        kernel.grouped_linear(torch.randn(2, 8), weight, index)
    with pytest.raises(ValueError, match=r"weight: expected dtype of x, torch\.float16, got torch\.float32"):
        kernel.grouped_linear(torch.randn(2, 16, dtype=torch.float16), weight, index)
    broken = quantization("stack").QuantizedStack(weight.codes, (), weight.format, weight.dtype)
    with pytest.raises(ValueError, match="weight: expected 1 tensors for its scales, got 0"):
        kernel.grouped_linear(torch.randn(2, 16), broken, index)
