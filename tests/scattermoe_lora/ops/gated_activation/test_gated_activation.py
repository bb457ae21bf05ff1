"""Gated activations, against the float64 reference and PyTorch's operators. Natively, and in Triton's interpreter."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import INTERPRETED, TRITON, assert_close

pytestmark = pytest.mark.usefixtures("bfloat16")

# What PyTorch runs for each.
ACTIVATIONS: dict[str, Any] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "gelu": F.gelu,
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}
if not TRITON:  # whose kernels do not take it
    TOLERANCE[torch.float64] = 1e-14
SHAPES = [(1,), (3, 5), (2, 3, 33), (7, 1500), (0, 8), (4, 0)]


def leaves(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """``gate``, ``up`` and a gradient, of the CPU's numbers on any device: beside one that is nearly zero, as an
    activation can be, rounding is large."""
    gate, up, grad = (
        (2 * torch.randn(shape, dtype=torch.float64, device="cpu")).to(torch.get_default_device(), dtype)
        for _ in range(3)
    )
    return [gate.requires_grad_(), up.requires_grad_(), grad]


def results(function: Any, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    y = function(gate, up)
    return [y, *torch.autograd.grad(y, (gate, up), grad)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_result_and_gradients_match_the_reference(kernel, submodule, activation, dtype) -> None:
    reference = submodule("ops.gated_activation.reference").gated_activation
    for shape in SHAPES:
        gate, up, grad = leaves(shape, dtype)
        got = results(lambda g, u: kernel.gated_activation(g, u, activation), gate, up, grad)
        assert all(t.dtype == dtype and t.is_contiguous() for t in got)
        wide = [t.detach().double().requires_grad_() for t in (gate, up, grad)]
        expected = results(lambda g, u: reference(g, u, activation), *wide)
        if gate.numel():
            assert_close(got, expected, TOLERANCE[dtype])
        else:
            assert [t.shape for t in got] == [t.shape for t in expected]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_and_bfloat16_are_what_pytorch_computes(kernel, activation) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = leaves((3, 7, 45), dtype)
        got = results(lambda g, u: kernel.gated_activation(g, u, activation), *arguments)
        plain = results(lambda g, u: ACTIVATIONS[activation](g) * u, *arguments)
        if TRITON:
            # Its exponential and its error function differ in the last bits.
            assert_close(got, plain, TOLERANCE[dtype])
        else:
            assert all(torch.equal(g, p) for g, p in zip(got, plain, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_is_clamped_and_its_interior_has_the_gradients_of_the_unclamped(
    kernel, submodule, activation
) -> None:
    infinite = float("inf")
    gate = torch.tensor([300, 300, 3, 65504, infinite, -infinite, infinite, 2, 0, -9], dtype=torch.float16)
    up = torch.tensor([300, -300, 4, 65504, 2, 3, -infinite, infinite, infinite, 5], dtype=torch.float16)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    grad = torch.full_like(gate, 0.5)
    y, d_gate, d_up = results(lambda g, u: kernel.gated_activation(g, u, activation), gate, up, grad)
    limit = submodule("ops.gated_activation.limits").LIMIT
    assert y[[0, 1, 3, 4, 6, 7]].tolist() == [limit, -limit, limit, limit, -limit, limit]
    assert y[[5, 8]].abs().tolist() == [0, 0]
    inside = [2, 9]
    wide = [t.detach()[inside].double().requires_grad_() for t in (gate, up, grad)]
    exact = results(lambda g, u: ACTIVATIONS[activation](g) * u, *wide)
    assert_close([t[inside] for t in (y, d_gate, d_up)], exact, 1e-3)
    outside = [i for i in range(len(gate)) if i not in inside]
    assert d_gate[outside].abs().sum() == d_up[outside].abs().sum() == 0
    nothing = torch.tensor([float("nan"), 1], dtype=torch.float16)
    assert kernel.gated_activation(nothing, nothing.flip(0), activation).isnan().all()


def test_rounding_in_float16_is_that_of_the_product_alone(kernel) -> None:
    gate, up, _ = leaves((40, 50), torch.float16)
    exact = F.silu(gate.double()) * up.double()
    got, plain = (y.double() for y in (kernel.gated_activation(gate, up, "silu"), F.silu(gate) * up))
    assert (got - exact).norm() < 0.9 * (plain - exact).norm()


def test_halves_of_one_projection_are_read_in_place_and_others_copied(kernel) -> None:
    h = torch.randn(2, 5, 66)
    for gate, up in (h.chunk(2, dim=-1), (h[..., ::2], h[..., 1::2]), (h.mT, h.mT.flip(0))):
        for dtype in (torch.float32, torch.float16):
            strided = gate.to(dtype), up.to(dtype)
            plain = kernel.gated_activation(*(t.contiguous() for t in strided))
            assert_close([kernel.gated_activation(*strided)], [plain], 2e-6)
    gate, up = (part.detach().requires_grad_() for part in h.chunk(2, dim=-1))
    expanded = torch.autograd.grad(kernel.gated_activation(gate, up).sum(), (gate, up))
    assert_close(
        expanded, torch.autograd.grad((F.gelu(gate, approximate="tanh") * up).sum(), (gate, up)), 2e-6
    )


def test_chunks_meet(kernel, submodule, monkeypatch) -> None:
    arguments = leaves((9, 33), torch.float16)
    whole = results(kernel.gated_activation, *arguments)
    monkeypatch.setattr(submodule("ops.gated_activation.cpu"), "_CHUNK_ELEMENTS", 70)
    if TRITON:
        monkeypatch.setattr(submodule("ops.gated_activation.gpu"), "_COLUMNS", 16)
    assert_close(results(kernel.gated_activation, *arguments), whole, 1e-3)


def test_backward_keeps_gate_and_up_alone_and_autocast_does_not_reach_into_it(kernel) -> None:
    gate, up, grad = leaves((3, 40), torch.float32)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        plain = results(kernel.gated_activation, gate, up, grad)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}
    with torch.autocast("cpu", torch.float16):
        cast = results(kernel.gated_activation, gate, up, grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_operators_pass_opcheck(submodule) -> None:
    op = submodule("ops.gated_activation.op")
    gate, up, grad = leaves((2, 5, 12), torch.float32)
    torch.library.opcheck(op.gated_activation_forward, (gate, up, "silu"))
    torch.library.opcheck(op.gated_activation_backward, (grad, gate.detach(), up.detach(), "silu"))


def test_result_of_the_down_projection_that_is_not_finite_becomes_zero(kernel) -> None:
    layers = [torch.nn.Linear(n, m, bias=False).half() for n, m in ((8, 16), (8, 16), (16, 8))]
    with torch.no_grad():
        layers[2].weight[3] = 60000
        for layer in layers[:2]:
            layer.weight[0] = 0
            layer.weight[0, 0] = 1
    x = torch.randn(4, 8).half()
    # Of the second the product overflows, and of the first the sum with the large weights.
    x[:, 0] = torch.tensor([2.0, 30000, 0, 0])
    x.requires_grad_()
    y = kernel.gated_mlp(x, *layers)
    plain = layers[2](F.gelu(layers[0](x), approximate="tanh") * layers[1](x))
    lost = plain.isfinite().logical_not()
    assert lost[1].all()
    assert lost[0, 3]
    assert not lost[[0, 2, 3], :3].any()
    assert y.isfinite().all()
    assert y[0, 3] == y[1, 3] == 0
    gradients = torch.autograd.grad(1e-3 * y.float().sum(), (x, *(layer.weight for layer in layers)))
    assert all(g.isfinite().all() for g in gradients)
    # The others' gradients are those of the formula, without what became 0.
    kept = [0, 2, 3]
    wide = x.detach()[kept].double().requires_grad_()
    g, u, d = (layer.weight.detach().double() for layer in layers)
    exact = (F.gelu(wide @ g.T, approximate="tanh") * (wide @ u.T)) @ d.T
    exact = torch.autograd.grad(1e-3 * (exact * ~lost[kept]).sum(), wide)
    assert_close([gradients[0][kept]], exact, 5e-3)
    assert kernel.gated_mlp(x.detach().float(), *(layer.float() for layer in layers))[1, 3].abs() > 1e9


if not INTERPRETED:

    def test_compiled_it_is_one_graph_with_the_same_bits(kernel) -> None:
        torch._dynamo.reset()
        weights = [torch.randn(n, m) / 4 for n, m in ((16, 8), (16, 8), (8, 16))]

        def mlp(x: torch.Tensor) -> torch.Tensor:
            return kernel.gated_mlp(x, *(lambda t, w=w: F.linear(t, w.to(t.dtype)) for w in weights))

        compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
        for dtype, tokens in ((torch.float32, 5), (torch.float16, 5), (torch.float16, 9)):
            x = (torch.randn(tokens, 8) * 10).to(dtype).requires_grad_()
            pairs = zip(*(
                (y, *torch.autograd.grad(y.sum(), x)) for y in (mlp(x), compiled(x))
            ), strict=True)  # fmt: skip
            assert all(torch.equal(a, b) for a, b in pairs)


if not TRITON:

    def test_gradients_pass_gradcheck(kernel) -> None:
        gate, up, _ = leaves((3, 4), torch.float64)
        for activation in ACTIVATIONS:
            run = partial(kernel.gated_activation, activation=activation)
            assert torch.autograd.gradcheck(run, (gate, up))

    def test_it_compiles_for_every_architecture_and_keeps_its_values_in_registers(submodule) -> None:
        from kernelpress.compile import aot

        specs = submodule("ops.gated_activation.specs").COMPILE_SPECS
        assert len(specs) == 2 * 3 * 3 * 2
        (spec,) = (s for s in specs if s.label == "gelu_tanh fp16 8448" and "backward" in s.kernel.__name__)
        for target in ("sm_80", "sm_120", "gfx942"):
            compiled = aot.compile_one(spec, target)
            assert (compiled.error, compiled.spilled) == (None, 0)


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, X, "relu"), "activation: expected one of silu, gelu_tanh, gelu, got relu"),
        ((X.long(), X), "gate: expected float64, float32, bfloat16 or float16, got torch.int64"),
        ((X[0, 0], X[0, 0]), "gate: expected [*, I], got a number without dimensions"),
        ((X, X[:, :4]), "up: expected shape of gate, [2, 8], got [2, 4]"),
        ((X, X.half()), "up: expected dtype of gate, torch.float32, got torch.float16"),
        ((X, X.to("meta")), "up: expected device of gate, cpu, got meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kernel, arguments, message) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"gated_activation: {message}") + "$"):
        kernel.gated_activation(*arguments)


def test_derivatives_that_it_does_not_have_are_refused(kernel) -> None:
    x = torch.randn(2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(kernel.gated_activation(x, x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="gated_activation: second derivatives"):
        gradient.sum().backward()
