"""RMSNorm, with a residual added or not, against the float64 reference. Natively, and in Triton's interpreter."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import INTERPRETED, TRITON, assert_close

pytestmark = pytest.mark.usefixtures("bfloat16")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
if not TRITON:  # whose kernels do not take it
    TOLERANCE[torch.float64] = 1e-14
SHAPES = [(1,), (5, 7), (2, 3, 80), (3, 1536), (0, 8), (1, 33)]


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.fixture
def reference(submodule):
    return submodule("ops.rms_norm.reference").rms_norm


def run(
    kernel: Any, x: torch.Tensor, residual: Any, weight: Any, grads: Any, **options: Any
) -> list[torch.Tensor]:
    """Results, and gradients of what there is of x, residual and weight."""
    inputs = [t for t in (x, residual, weight) if t is not None]
    if residual is None:
        y = kernel.rms_norm(x, weight, 1e-6, **options)
        return [y, *torch.autograd.grad(y, inputs, grads[0].to(y.dtype))]
    y, total = kernel.add_rms_norm(x, residual, weight, 1e-6, **options)
    return [y, total, *torch.autograd.grad((y, total), inputs, (grads[0].to(y.dtype), grads[1]))]


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_result_and_gradients_match_the_reference(kernel, reference, dtype, added) -> None:
    for shape in SHAPES:
        for weighted, offset in ((False, 0.0), (True, 0.0), (True, 1.0)):
            x, other, *grads = (random(*shape, dtype=dtype) for _ in range(4))
            leaves = [x, other if added else None, random(shape[-1], dtype=dtype) if weighted else None]
            leaves = [None if t is None else t.requires_grad_() for t in leaves]
            got = run(kernel, *leaves, grads, offset=offset)
            assert all(t.dtype == dtype and t.is_contiguous() for t in got)
            x, residual, weight = (
                None if t is None else t.detach().double().requires_grad_() for t in leaves
            )
            y, total = reference(x, weight, 1e-6, offset, residual)
            results = (y, total) if added else (y,)
            exact = torch.autograd.grad(
                results,
                [t for t in (x, residual, weight) if t is not None],
                [g.double() for g in grads[: len(results)]],
            )
            assert all(g.shape == e.shape for g, e in zip(got, (*results, *exact), strict=True))
            if got[0].numel():
                assert_close(got[: len(results)], results, TOLERANCE[dtype])
                if shape[-1] > 1:  # a row of one element has no gradient but rounding
                    assert_close(got[len(results) :], exact, TOLERANCE[dtype])


def transformers_norm(kind: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = {"gemma3": Gemma3RMSNorm, "gemma4": Gemma4RMSNorm, "llama": LlamaRMSNorm}[kind](x.shape[-1], 1e-3)
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


OPTIONS: dict[str, Any] = {"gemma3": {"offset": 1.0}, "gemma4": {}, "llama": {"round_first": True}}


@pytest.mark.parametrize("kind", OPTIONS)
def test_it_rounds_to_the_same_bits_as_transformers(kernel, kind) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for dtype, weight_dtype in ((a, b) for a in dtypes for b in (a, torch.float32)):
        x, weight = random(3, 5, 200, dtype=dtype), random(200, dtype=weight_dtype)
        got = kernel.rms_norm(x, weight, 1e-3, **OPTIONS[kind])
        expected = transformers_norm(kind, x, weight)
        assert got.dtype == expected.dtype
        if TRITON:
            # The sum of squares is taken in another order: now and then the last bit differs.
            assert_close([got], [expected], TOLERANCE[dtype])
        else:
            assert torch.equal(got, expected)


def test_rows_in_other_strides_and_expanded_gradients_are_read(kernel) -> None:
    wide, weight = torch.randn(4, 5, 96), torch.randn(64)[::2]
    for x in (wide[..., 32:64], wide[:, :, 1::3], wide[:, 0, :32].expand(3, 4, 32)):
        x = x.detach().requires_grad_()
        plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        results = []
        for leaf, w in ((x, weight), (plain, weight.contiguous())):
            y, total = kernel.add_rms_norm(leaf, leaf.detach() + 1, w)
            results.append([y, total, *torch.autograd.grad(y.sum(), leaf)])
        assert_close(*results, 2e-6)


def test_chunks_and_blocks_meet_and_the_same_input_gives_the_same_bits(
    kernel, reference, submodule, monkeypatch
) -> None:
    x, residual, *grads = (random(19, 24, dtype=torch.float32) for _ in range(4))
    leaves = [t.requires_grad_() for t in (x, residual, random(24, dtype=torch.float32))]
    exact = run(kernel, *leaves, grads)
    assert all(torch.equal(a, b) for a, b in zip(run(kernel, *leaves, grads), exact, strict=True))
    monkeypatch.setattr(submodule("ops.rms_norm.cpu"), "_CHUNK_ELEMENTS", 50)
    if TRITON:
        gpu = submodule("ops.rms_norm.gpu")
        monkeypatch.setattr(gpu, "_ELEMENTS", 64)
        monkeypatch.setattr(gpu, "_SUMMING_PROGRAMS", 3)
    assert_close(run(kernel, *leaves, grads), exact, 2e-6)


def test_only_the_gradients_asked_for_are_computed_in_the_same_bits(kernel) -> None:
    x, residual, *grads = (random(4, 24, dtype=torch.float32) for _ in range(4))
    leaves = [t.requires_grad_() for t in (x, residual, random(24, dtype=torch.float32))]
    y, total = kernel.add_rms_norm(*leaves)
    every = torch.autograd.grad((y, total), leaves, grads, retain_graph=True)
    assert torch.equal(every[0], every[1])
    assert torch.equal(torch.autograd.grad(total, x, grads[1], retain_graph=True)[0], grads[1])
    (alone,) = torch.autograd.grad(y, leaves[2], grads[0])
    assert torch.equal(alone, every[2])
    (of_residual,) = torch.autograd.grad(
        kernel.add_rms_norm(x.detach(), residual, leaves[2].detach()), residual, grads
    )
    assert torch.equal(of_residual, every[1])
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        _, total = kernel.add_rms_norm(*leaves)
    assert [t.data_ptr() for t in saved if t.numel() >= x.numel()] == [total.data_ptr()]


def test_rows_of_zeros_have_finite_gradients_in_half_precision(kernel) -> None:
    x = torch.zeros(2, 16, dtype=torch.float16, requires_grad=True)
    y = kernel.rms_norm(x)
    assert y.eq(0).all()
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_operators_pass_opcheck(submodule) -> None:
    op = submodule("ops.rms_norm.op")
    x, residual, grad = (random(2, 5, 12, dtype=torch.float32) for _ in range(3))
    weight = random(12, dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, weight, residual)]
    torch.library.opcheck(op.rms_norm_forward, (*leaves[:2], 1e-6, 1.0, False, leaves[2]))
    torch.library.opcheck(op.rms_norm_forward, (leaves[0], None, 1e-6, 0.0, True, None))
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(op.rms_norm_backward, (grad, residual, x, weight, 1e-6, 1.0, False, needs))


if not TRITON:

    def test_gradients_pass_gradcheck(kernel) -> None:
        x, residual, weight = (
            random(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 6), (3, 6), (6,))
        )
        assert torch.autograd.gradcheck(lambda *t: kernel.add_rms_norm(*t, offset=1.0), (x, residual, weight))

    def test_every_kernel_compiles_and_keeps_its_values_in_registers(submodule) -> None:
        from kernelpress.compile import aot

        labels = ("fp32 5376, added, weighted", "fp32 5376, added, d weight")
        specs = [s for s in submodule("ops.rms_norm.specs").COMPILE_SPECS if s.label in labels]
        assert len(specs) == 3
        for target in ("sm_90", "gfx942"):
            for compiled in (aot.compile_one(spec, target) for spec in specs):
                assert (compiled.error, compiled.spilled) == (None, 0)


if not INTERPRETED:

    def test_compiled_it_is_one_graph_with_the_same_bits(kernel) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(kernel.add_rms_norm, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (4, 7):
            x, residual, *grads = (random(tokens, 24, dtype=torch.float32) for _ in range(4))
            leaves = [t.requires_grad_() for t in (x, residual, random(24, dtype=torch.float32))]
            results = []
            for function in (kernel.add_rms_norm, compiled):
                out = function(*leaves)
                results.append([*out, *torch.autograd.grad(out, leaves, grads)])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


X, WEIGHT = torch.zeros(2, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[:, :0],), "rms_norm: x: expected [*, H] with H of at least 1, got [2, 0]"),
        ((X.long(),), "rms_norm: x: expected float64, float32, bfloat16 or float16, got torch.int64"),
        ((X, WEIGHT[:7]), "rms_norm: weight: expected shape [8], got [7]"),
        (
            (X, WEIGHT.bool()),
            "rms_norm: weight: expected float64, float32, bfloat16 or float16, got torch.bool",
        ),
        ((X, WEIGHT.to("meta")), "rms_norm: weight: expected device of x, cpu, got meta"),
        ((X, X[:1], None), "add_rms_norm: residual: expected shape of x, [2, 8], got [1, 8]"),
        (
            (X, X.half(), None),
            "add_rms_norm: residual: expected dtype of x, torch.float32, got torch.float16",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kernel, arguments, message) -> None:
    function = kernel.rms_norm if message.startswith("rms") else kernel.add_rms_norm
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        function(*arguments)


def test_derivatives_that_it_does_not_have_are_refused(kernel) -> None:
    x = torch.randn(2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(kernel.rms_norm(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="rms_norm: second derivatives"):
        gradient.sum().backward()
