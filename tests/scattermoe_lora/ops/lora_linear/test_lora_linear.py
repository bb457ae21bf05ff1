"""Projections with low-rank adapters, against the float64 reference."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import pytest
import torch
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SCALING = 1.5


class Case:
    """Projections of one input: ``ranks`` has those of each one's adapters, ``biased`` the projections with a bias."""

    def __init__(
        self,
        tokens: tuple[int, ...],
        n_in: int,
        n_out: tuple[int, ...],
        ranks: tuple[tuple[int, ...], ...],
        biased: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        factor_dtype: torch.dtype | None = None,
    ) -> None:
        def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return (torch.randn(*shape, dtype=torch.float64) * shape[-1] ** -0.5).to(dtype)

        def factor(*shape: int) -> torch.Tensor:
            return random(*shape, dtype=factor_dtype or dtype).requires_grad_()

        self.x = random(*tokens, n_in).requires_grad_()
        self.weights = [random(n, n_in) for n in n_out]
        self.a = [[factor(r, n_in) for r in own] for own in ranks]
        self.b = [[factor(n, r) for r in own] for n, own in zip(n_out, ranks, strict=True)]
        self.biases = [random(n).requires_grad_() if p in biased else None for p, n in enumerate(n_out)]
        self.grads = [random(*tokens, n) for n in n_out]

    def leaves(self) -> list[torch.Tensor]:
        factors = [t for group in (*self.a, *self.b) for t in group]
        return [self.x, *factors, *(bias for bias in self.biases if bias is not None)]

    def results(self, kernel: Any, **options: Any) -> list[torch.Tensor]:
        """Outputs and gradients."""
        ys = kernel.lora_linear(self.x, self.weights, self.a, self.b, self.biases, scaling=SCALING, **options)
        return [*ys, *torch.autograd.grad(ys, self.leaves(), self.grads)]

    def exact(self, reference: Any, masks: Any = None) -> list[torch.Tensor]:
        """The same in float64."""
        wide = {id(t): t.detach().double().requires_grad_() for t in self.leaves()}
        adapters = [
            [(wide[id(a)], wide[id(b)], SCALING) for a, b in zip(*pair, strict=True)]
            for pair in zip(self.a, self.b, strict=True)
        ]
        biases = [None if bias is None else wide[id(bias)] for bias in self.biases]
        ys = reference(wide[id(self.x)], [w.double() for w in self.weights], adapters, biases, masks)
        return [*ys, *torch.autograd.grad(ys, list(wide.values()), [grad.double() for grad in self.grads])]


@pytest.fixture
def reference(submodule):
    return submodule("ops.lora_linear.reference").lora_linear


# One token; a projection without adapters; several adapters; ranks above the widths; no adapter at all; a large one.
AWKWARD = [
    ((1,), 8, (5,), ((3,),), ()),
    ((2, 7), 33, (20, 9, 11), ((3,), (), (2, 5)), (0, 1)),
    ((13,), 6, (3, 4), ((17,), (1, 9, 2)), (1,)),
    ((3, 1, 2), 10, (7, 7), ((), ()), (0,)),
    ((160,), 96, (128, 72), ((8,), (8,)), ()),
]


@pytest.mark.parametrize("case", AWKWARD, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_output_and_gradients_match_the_reference(kernel, reference, case, dtype) -> None:
    run = Case(*case, dtype=dtype)
    got = run.results(kernel)
    assert all(t.dtype == dtype for t in got)
    assert all(y.is_contiguous() for y in got[: len(run.weights)])
    assert_close(got, run.exact(reference), TOLERANCE[dtype])


@pytest.mark.parametrize("onednn", [False, True])
def test_both_libraries_of_float32_give_the_same(kernel, submodule, reference, monkeypatch, onednn) -> None:
    products = submodule("ops.lora_linear.products")
    if onednn and not submodule("ops.cpu_matmul").has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_LARGE", 1)
    monkeypatch.setattr(products, "prefers_onednn", lambda: onednn)
    for case in AWKWARD:
        run = Case(*case)
        run.weights[0] = run.weights[0].t().contiguous().t()
        assert_close(run.results(kernel), run.exact(reference), 3e-6)


@given(
    tokens=st.integers(0, 9),
    n_in=st.integers(1, 20),
    n_out=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_shape(kernel, submodule, tokens, n_in, n_out, data) -> None:
    ranks = tuple(tuple(data.draw(st.lists(st.integers(1, 9), max_size=2))) for _ in n_out)
    run = Case((tokens,), n_in, tuple(n_out), ranks, biased=(0,), dtype=torch.float64)
    oracle = submodule("ops.lora_linear.reference").lora_linear
    for got, exact in zip(run.results(kernel), run.exact(oracle), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


def test_float32_factors_beside_half_precision_are_rounded_once_and_get_float32_gradients(
    kernel, reference
) -> None:
    """As PEFT keeps them. The result is closer to the exact one than that of PEFT's own operations under autocast."""
    run = Case((64,), 96, (128,), ((8,),), dtype=torch.bfloat16, factor_dtype=torch.float32)
    got, exact = run.results(kernel), run.exact(reference)
    assert [t.dtype for t in got] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert_close(got, exact, 2e-2)
    rows, [[a]], [[b]] = run.x.detach(), run.a, run.b
    plain = rows @ run.weights[0].t() + rows @ a.t().bfloat16() @ b.t().bfloat16() * SCALING
    errors = [(y.double() - exact[0]).norm() for y in (got[0], plain)]
    # On a GPU the base product is rounded before the rest is added, as PEFT's is.
    assert errors[0] < (0.9 if run.x.device.type == "cpu" else 1.0) * errors[1], errors


def masks_of(submodule: Any, run: Case, seed: torch.Tensor, probabilities: list[float]) -> list[Any]:
    """What each adapter's input is multiplied with, as the operator draws it."""
    operands = submodule("ops.lora_linear.arguments").Operands(
        run.x.detach().reshape(-1, run.x.shape[-1]),
        run.weights,
        [],
        [],
        [],
        seed,
        [],
        [],
        probabilities,
        [],
        [],
    )
    dropped = submodule("ops.lora_linear.products")._dropped(operands)
    return [
        1.0 if mask is None else (mask / (1 - p)).view(run.x.shape).double()
        for (_, mask), p in zip(dropped, probabilities, strict=True)
    ]


def test_dropout_is_of_the_low_rank_path_alone_and_drawn_for_each_adapter(
    kernel, submodule, reference
) -> None:
    run = Case((40,), 50, (9, 8), ((3, 2), (4,)), biased=(1,), dtype=torch.float64)
    state = torch.get_rng_state()
    got = run.results(kernel, dropout=0.3)
    torch.set_rng_state(state)
    first, second, third = masks_of(submodule, run, torch.randint(2**63 - 1, ()), [0.3] * 3)
    assert_close(got, run.exact(reference, [[first, second], [third]]), 1e-13)
    assert 0.25 < (first == 0).double().mean() < 0.35
    assert ((first == 0) != (second == 0)).any()
    # Another call draws others.
    assert not torch.equal(run.results(kernel, dropout=0.3)[0], got[0])


def test_adapters_with_and_without_dropout_stand_together(kernel, submodule, reference) -> None:
    api = submodule("ops.lora_linear.api")
    run = Case((12,), 10, (9, 8), ((3, 2), (4,)), dtype=torch.float64)
    factors = zip([0, 0, 1], [*chain(*run.a)], [*chain(*run.b)], [0.0, 0.4, 0.0], strict=True)
    state = torch.get_rng_state()
    ys = api.project(run.x, run.weights, [api.Pair(p, a, b, SCALING, drop) for p, a, b, drop in factors], [])
    torch.set_rng_state(state)
    first, second, third = masks_of(submodule, run, torch.randint(2**63 - 1, ()), [0.0, 0.4, 0.0])
    got = [*ys, *torch.autograd.grad(ys, run.leaves(), run.grads)]
    assert_close(got, run.exact(reference, [[first, second], [third]]), 1e-13)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_nothing(kernel, dropout) -> None:
    run = Case((12,), 10, (9, 8), ((3,), (4,)))
    torch.manual_seed(1)
    plain = run.results(kernel, dropout=dropout)
    torch.manual_seed(1)
    ys = checkpoint(
        lambda x: kernel.lora_linear(x, run.weights, run.a, run.b, scaling=SCALING, dropout=dropout),
        run.x,
        use_reentrant=False,
    )
    got = [*ys, *torch.autograd.grad(ys, run.leaves(), run.grads)]
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_backward_keeps_the_input_and_the_low_rank_product_and_no_mask(kernel) -> None:
    run = Case((64,), 32, (48, 40), ((4,), (4,)))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        kernel.lora_linear(run.x, run.weights, run.a, run.b, dropout=0.5)
    mine = {t.data_ptr() for t in (*run.leaves(), *run.weights)}
    others = [t for t in saved if t.data_ptr() not in mine]
    assert sorted(t.numel() for t in others) == [1, 64 * 8]


def test_only_the_gradients_asked_for_are_computed(kernel, submodule, monkeypatch) -> None:
    products, asked = submodule("ops.lora_linear.products"), []
    backward = products.backward
    monkeypatch.setattr(products, "backward", lambda *args: (asked.append(set(args[-1])), backward(*args))[1])
    run = Case((7,), 6, (5, 4), ((2,), (3,)), biased=(0,))
    run.weights[1].requires_grad_()
    ys = kernel.lora_linear(run.x, run.weights, run.a, run.b, run.biases)
    dw = torch.autograd.grad(ys[1].sum(), run.weights[1], retain_graph=True)[0]
    assert torch.allclose(dw, run.x.detach().sum(0).expand(4, 6), atol=1e-5)
    # Of the second output alone: nothing for the first one's adapters and bias.
    ys[1].sum().backward()
    assert asked[-1] == {("x", 0), ("weights", 1), ("a", 1), ("b", 1)}
    assert run.a[0][0].grad is None
    frozen = kernel.lora_linear(run.x.detach(), run.weights[:1], run.a[:1], run.b[:1])
    frozen[0].sum().backward()
    assert asked[-1] == {("a", 0), ("b", 0)}
    with torch.no_grad():
        assert not kernel.lora_linear(run.x, run.weights, run.a, run.b)[0].requires_grad


def test_autocast_computes_in_its_dtype(kernel) -> None:
    run = Case((16,), 12, (9,), ((3,),), biased=(0,))
    with torch.autocast("cpu", torch.bfloat16):
        [y] = kernel.lora_linear(run.x, run.weights, run.a, run.b, run.biases)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, run.leaves(), run.grads[0].bfloat16())
    assert all(g.dtype == torch.float32 for g in gradients)
    [plain] = kernel.lora_linear(
        run.x.bfloat16(), [w.bfloat16() for w in run.weights], run.a, run.b, run.biases
    )
    assert torch.equal(y, plain)


def test_it_is_one_operator_of_a_compiled_graph(kernel) -> None:
    run = Case((12,), 10, (9, 8), ((3,), (2, 4)), biased=(1,))

    def project(x: torch.Tensor) -> list[torch.Tensor]:
        return kernel.lora_linear(x * 2, run.weights, run.a, run.b, run.biases, dropout=0.2)

    torch._dynamo.reset()
    compiled = torch.compile(project, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (12, 5):
        x = run.x.detach()[:tokens].requires_grad_()
        results = []
        for function in (project, compiled):
            torch.manual_seed(3)
            ys = function(x)
            leaves = [x, *run.leaves()[1:]]
            results.append([*ys, *torch.autograd.grad([y.sin().sum() for y in ys], leaves)])
        assert_close(results[1], results[0], 1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_operators_keep_torchs_contract(submodule, dropout) -> None:
    op = submodule("ops.lora_linear.op")
    run = Case((6,), 5, (4, 3), ((2,), (1, 2)), biased=(1,))
    seed = torch.tensor(5) if dropout else None
    arguments = (
        run.x,
        run.weights,
        [*chain(*run.a)],
        [*chain(*run.b)],
        [run.biases[1]],
        seed,
        [0, 1, 1],
        [1.0, 2.0, 0.5],
        [dropout, 0.0, dropout],
        [1],
        [1.0],
    )
    torch.library.opcheck(op.lora_linear_forward, arguments)


def test_the_same_input_gives_the_same_bits(kernel) -> None:
    run = Case((160,), 96, (128, 72), ((8,), (8,)))
    assert all(torch.equal(a, b) for a, b in zip(run.results(kernel), run.results(kernel), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "weights: expected one at least, got none"),
        ({"lora_a": []}, "lora_a: expected one entry for each of the 1 weights, got 0"),
        ({"weights": [torch.ones(4, 6)]}, "weights[0]: expected shape [N_p, 5], got [4, 6]"),
        (
            {"weights": [torch.ones(4, 5).half()]},
            "weights[0]: expected dtype of x, torch.float32, got torch.fl",
        ),
        ({"lora_a": [torch.ones(2, 6)]}, "lora_a[0]: expected shape [r, 5], got [2, 6]"),
        ({"lora_b": [torch.ones(4, 3)]}, "lora_b[0]: expected shape [4, 2], got [4, 3]"),
        ({"lora_b": [None]}, "lora_b[0]: expected as many factors as lora_a[0] has, 1, got 0"),
        ({"lora_b": [torch.ones(4, 2, device="meta")]}, "lora_b[0]: expected device of x, cpu, got meta"),
        ({"biases": [torch.ones(5)]}, "biases[0]: expected shape [4], got [5]"),
        ({"scaling": [[1.0, 2.0]]}, "scaling[0]: expected one factor for each of 1 adapters, got 2"),
        ({"scaling": []}, "scaling[0]: expected one factor for each of 1 adapters, got 0"),
        ({"dropout": 1.0}, "dropout: expected a probability in [0, 1), got 1.0"),
        (
            {"x": torch.ones(3, 5, dtype=torch.int64)},
            "x: expected float64, float32, bfloat16 or float16, got",
        ),
        ({"x": torch.ones(())}, "x: expected [..., N_in], got []"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_named(kernel, change, message) -> None:
    arguments = {
        "x": torch.ones(3, 5),
        "weights": [torch.ones(4, 5)],
        "lora_a": [torch.ones(2, 5)],
        "lora_b": [torch.ones(4, 2)],
    }
    with pytest.raises(ValueError, match=re.escape(f"lora_linear: {message}")):
        kernel.lora_linear(**(arguments | change))


def test_other_derivatives_are_refused_by_name(kernel) -> None:
    run = Case((4,), 5, (3,), ((2,),))
    [y] = kernel.lora_linear(run.x, run.weights, run.a, run.b)
    [dx] = torch.autograd.grad(y.sum(), run.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="lora_linear: second derivatives"):
        torch.autograd.grad(dx.sum(), run.a[0][0])
    with pytest.raises(NotImplementedError, match="lora_linear: forward-mode"):
        torch.func.jvp(
            lambda x: kernel.lora_linear(x, run.weights, run.a, run.b)[0], (run.x,), (torch.ones_like(run.x),)
        )
