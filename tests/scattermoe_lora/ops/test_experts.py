"""The fused experts layer, against the float64 reference. Runs natively, and in Triton's interpreter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import AWKWARD, Shape, assert_close, error, experts_module, low_rank, route
from hypothesis import given
from hypothesis import strategies as st

Gradients = list[torch.Tensor]


def run(
    kernel: ModuleType,
    module: Any,
    hidden_states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    lora: dict[str, tuple[torch.Tensor, torch.Tensor]],
    grad_out: torch.Tensor,
) -> Gradients:
    """Output, then the gradients of hidden states, routing weights, base weights (if trainable) and factors."""
    leaves = [hidden_states, weights, *module.parameters(), *(f for pair in lora.values() for f in pair)]
    out = kernel.experts_forward(module, hidden_states, index, weights, lora=lora)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    return [out, *torch.autograd.grad(out, trained, grad_out)]


def exact(
    submodule: Any,
    module: Any,
    hidden_states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    lora: dict[str, tuple[torch.Tensor, torch.Tensor]],
    grad_out: torch.Tensor,
    activation: str,
) -> Gradients:
    """The same as :func:`run`, by the reference in float64."""

    def wide(t: torch.Tensor) -> torch.Tensor:
        return t.detach().double().requires_grad_(t.requires_grad)

    x, w, gate_up, down = map(wide, (hidden_states, weights, module.gate_up_proj, module.down_proj))
    factors = {name: tuple(map(wide, pair)) for name, pair in lora.items()}
    out = submodule("ops.experts.reference").experts(
        x,
        gate_up,
        down,
        index,
        w,
        *factors.get("gate_up_proj", (None, None)),
        *factors.get("down_proj", (None, None)),
        submodule("ops.activation").Gate(activation),
    )
    leaves = [x, w, gate_up, down, *(f for pair in factors.values() for f in pair)]
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    return [out, *torch.autograd.grad(out, trained, grad_out.double())]


def problem(
    shape: Shape,
    activation: str,
    dtype: torch.dtype,
    *,
    targets: tuple[str, ...],
    train_base: bool,
    sentinels: bool,
) -> tuple[Any, ...]:
    module = experts_module(shape, activation, dtype).requires_grad_(train_base)
    x = torch.randn(shape.tokens, shape.hidden).to(dtype).requires_grad_()
    weights = torch.rand(shape.tokens, shape.top_k).to(dtype).requires_grad_()
    sizes = {
        "gate_up_proj": (2 * shape.intermediate, shape.hidden),
        "down_proj": (shape.hidden, shape.intermediate),
    }
    lora = {
        name: tuple(f.to(dtype).requires_grad_() for f in low_rank(shape.experts, *sizes[name], shape.rank))
        for name in targets
    }
    return (
        module,
        x,
        route(shape, sentinels),
        weights,
        lora,
        torch.randn(shape.tokens, shape.hidden).to(dtype),
    )


BOTH = ("gate_up_proj", "down_proj")


@pytest.mark.parametrize(
    ("shape", "activation"),
    [*((shape, "silu") for shape in AWKWARD), (AWKWARD[1], "gelu_tanh"), (AWKWARD[2], "gelu")],
    ids=str,
)
def test_output_and_gradients_match_the_reference(kernel, submodule, shape, activation) -> None:
    arguments = problem(shape, activation, torch.float32, targets=BOTH, train_base=False, sentinels=False)
    assert_close(run(kernel, *arguments), exact(submodule, *arguments, activation), 2e-5)


@given(
    shape=st.builds(
        Shape,
        tokens=st.integers(1, 24),
        experts=st.integers(1, 6),
        top_k=st.just(1),
        hidden=st.integers(1, 48),
        intermediate=st.integers(1, 40),
        rank=st.integers(1, 20),
    ),
    top_k=st.integers(1, 4),
    targets=st.sampled_from([(), ("gate_up_proj",), ("down_proj",), BOTH]),
    train_base=st.booleans(),
    sentinels=st.booleans(),
)
def test_any_shape_any_target_trained_or_frozen(
    kernel, submodule, shape, top_k, targets, train_base, sentinels
) -> None:
    shape = Shape(**{**vars(shape), "top_k": min(top_k, shape.experts)})
    arguments = problem(
        shape, "silu", torch.float32, targets=targets, train_base=train_base, sentinels=sentinels
    )
    assert_close(run(kernel, *arguments), exact(submodule, *arguments, "silu"), 1e-4)


def test_all_tokens_on_one_expert(kernel, submodule) -> None:
    shape = Shape(tokens=40, experts=4, top_k=1, hidden=24, intermediate=16, rank=4)
    module, x, index, *rest = problem(
        shape, "silu", torch.float32, targets=BOTH, train_base=True, sentinels=False
    )
    arguments = (module, x, torch.full_like(index, 2), *rest)
    assert_close(run(kernel, *arguments), exact(submodule, *arguments, "silu"), 2e-5)


def test_sentinels_alone_give_zeros(kernel) -> None:
    shape = AWKWARD[1]
    module, x, index, *rest = problem(
        shape, "silu", torch.float32, targets=BOTH, train_base=True, sentinels=False
    )
    results = run(kernel, module, x, torch.full_like(index, shape.experts), *rest)
    assert all(bool((t == 0).all()) for t in results)


def test_no_tokens_give_no_rows(kernel) -> None:
    module = experts_module(AWKWARD[1])
    out = kernel.experts_forward(
        module, torch.zeros(0, 33), torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3)
    )
    assert out.shape == (0, 33)


def test_equal_calls_give_equal_bits(kernel) -> None:
    arguments = problem(AWKWARD[1], "silu", torch.float32, targets=BOTH, train_base=True, sentinels=True)
    for first, second in zip(run(kernel, *arguments), run(kernel, *arguments), strict=True):
        assert torch.equal(first, second)


def test_nan_in_one_token_stays_in_that_token(kernel) -> None:
    module = experts_module(AWKWARD[1])
    x = torch.randn(7, 33)
    x[3] = float("nan")
    out = kernel.experts_forward(module, x, route(AWKWARD[1]), torch.rand(7, 3))
    assert out[3].isnan().all()
    assert not out[[0, 1, 2, 4, 5, 6]].isnan().any()


@pytest.mark.parametrize("side", [0, 1], ids="AB")
@pytest.mark.parametrize("target", BOTH)
def test_an_infinite_factor_of_an_expert_without_rows_reaches_no_gradient(kernel, target, side) -> None:
    """On a CPU experts are computed in blocks of equally many rows, those that pad times infinity among them."""
    shape = AWKWARD[1]
    module, x, index, weights, lora, grad = problem(
        shape, "silu", torch.float32, targets=BOTH, train_base=True, sentinels=False
    )
    index = torch.where(index == 1, 2, index)
    with torch.no_grad():
        lora[target][side][1] = float("inf")
    out, *gradients = run(kernel, module, x, index, weights, lora, grad)
    assert out.isfinite().all()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert not any(bool(gradient[1].any()) for gradient in gradients[2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("bfloat16")
def test_half_precision_is_as_close_to_the_truth_as_the_merged_eager_path(kernel, submodule, dtype) -> None:
    shape = Shape(tokens=33, experts=4, top_k=2, hidden=96, intermediate=64, rank=8)
    module, x, index, weights, lora, grad_out = problem(
        shape, "gelu_tanh", dtype, targets=BOTH, train_base=False, sentinels=False
    )
    results = run(kernel, module, x, index, weights, lora, grad_out)
    truth = exact(submodule, module, x, index, weights, lora, grad_out, "gelu_tanh")

    merged = experts_module(shape, "gelu_tanh", dtype)
    for name, (a, b) in lora.items():
        merged_weight = getattr(module, name) + (b.float() @ a.float()).to(dtype)
        delattr(merged, name)
        setattr(merged, name, merged_weight)
    out = merged(x, index, weights)
    eager = [out, *torch.autograd.grad(out, [x, weights, *(f for p in lora.values() for f in p)], grad_out)]
    for ours, theirs, true in zip(results, eager, truth, strict=True):
        norm = true.norm()
        assert (ours.double() - true).norm() / norm <= 1.1 * (theirs.double() - true).norm() / norm


def test_the_reference_is_what_transformers_computes(submodule) -> None:
    shape = AWKWARD[1]
    module, x, index, weights, *_ = problem(
        shape, "gelu_tanh", torch.float64, targets=(), train_base=False, sentinels=False
    )
    ours = submodule("ops.experts.reference").experts(
        x,
        module.gate_up_proj,
        module.down_proj,
        index,
        weights,
        None,
        None,
        None,
        None,
        submodule("ops.activation").Gate("gelu_tanh"),
    )
    assert error(ours, module(x, index, weights)) < 1e-12


@pytest.mark.parametrize("block_bytes", [1, 800, 4000])
def test_experts_taken_a_few_at_a_time_match_the_reference(
    kernel, submodule, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    # At these sizes all experts would fit the CPU code's buffers at once.
    monkeypatch.setattr(submodule("ops.cpu_blocks"), "_BLOCK_BYTES", block_bytes)
    arguments = problem(AWKWARD[1], "silu", torch.float32, targets=BOTH, train_base=True, sentinels=True)
    assert_close(run(kernel, *arguments), exact(submodule, *arguments, "silu"), 2e-5)
