"""Attention's native CPU code: the layouts that it multiplies, and the sums of several blocks of queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

HEADS = {
    "as many key heads": (4, 4),
    "2 to 1": (4, 2),
    "8 to 1": (16, 2),
    "one key head": (4, 1),
    "one head": (1, 1),
}


class Weights(TorchDispatchMode):
    """Notes the layout of each matrix that oneDNN gets as a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.dense: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
            weight = args[2] if func._overloadname == "binary" else args[1]
            self.dense.append(weight.is_contiguous() or weight.t().is_contiguous())
        return func(*args, **(kwargs or {}))


def by_rows(rows: int, heads: int) -> torch.Tensor:
    return torch.randn(1, rows, heads, 64)


def by_heads(rows: int, heads: int) -> torch.Tensor:
    return torch.randn(1, heads, rows, 64).transpose(1, 2)


def of_a_fused_projection(rows: int, heads: int) -> torch.Tensor:
    return torch.randn(1, rows, 3, heads, 64)[:, :, 1]


@pytest.mark.parametrize("layout", [by_rows, by_heads, of_a_fused_projection])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_every_matrix_has_a_layout_that_onednn_has_code_for(
    submodule, monkeypatch: pytest.MonkeyPatch, heads: str, dtype: torch.dtype, layout: Any
) -> None:
    monkeypatch.setattr(submodule("ops.attention.cpu_matmul"), "_LARGE", 1)
    cpu, arguments = submodule("ops.attention.cpu"), submodule("ops.attention.arguments")
    q, k, v, do = (
        layout(128, n).to(dtype) for n in (HEADS[heads][0], *HEADS[heads][1:] * 2, HEADS[heads][0])
    )
    operands, settings = (
        arguments.Operands(q, k, v, None, None),
        arguments.Settings(128, 128, 0.125, -1, 0, 0.0),
    )
    with Weights() as weights:
        out, lse = cpu.forward(operands, settings)
        gradients = cpu.backward(do, None, operands, out, lse, settings)
    assert weights.dense
    assert all(weights.dense)
    reference, window = submodule("ops.attention.reference"), submodule("ops.attention.window").Window(-1, 0)
    exact_inputs = [x[0].double().requires_grad_() for x in (q, k, v)]
    exact, _ = reference.attention(*exact_inputs, 0.125, window)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, do[0].double())
    assert_close(
        [x[0] for x in (out, *gradients)], [exact, *exact_gradients], 2e-5 if dtype == torch.float32 else 2e-3
    )


@pytest.mark.parametrize("layout", ["columns", "columns, transposed"])
def test_a_weight_of_any_layout_is_laid_out_for_onednn(
    submodule, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    cpu_matmul = submodule("ops.cpu_matmul")
    monkeypatch.setattr(cpu_matmul, "_LARGE", 1)
    right = torch.randn(48, 2, 32)[:, 0] if layout == "columns" else torch.randn(32, 2, 48)[:, 0].t()
    monkeypatch.setattr(cpu_matmul, "prefers_onednn", lambda: True)
    x = torch.randn(16, 48)
    with Weights() as weights:
        got = cpu_matmul.add_matmul(x, right, torch.ones(16, 32))
    assert weights.dense == [True]
    assert_close([got], [x.double() @ right.double() + 1], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("queries", "heads"), [(1, 4), (339, 1), (339, 4)])
def test_a_query_of_one_key_gets_no_gradient_at_all(
    kernel, dtype: torch.dtype, queries: int, heads: int
) -> None:
    """Its probability is 1 whatever the score: dQ and dK are 0, and dV is the sum of the gradients that arrive."""
    q, do = (torch.randn(1, queries, heads, 64).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, 1, 1, 64).to(dtype).requires_grad_() for _ in range(2))
    dq, dk, dv = torch.autograd.grad(kernel.flash_attn_func(q.requires_grad_(), k, v), (q, k, v), do)
    assert not dq.any()
    assert not dk.any()
    exact = do.double().sum((1, 2))
    rounding = (exact.to(dtype).double() - exact).abs().max()
    # What is left of a sum in float32.
    summed = 1e-12 if dtype == torch.float64 else 1e-5 * exact.abs().max()
    assert (dv.double().view_as(exact) - exact).abs().max() <= rounding + summed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_query_of_a_causal_sequence_gets_no_gradient_either(kernel, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 33, heads, 64).to(dtype).requires_grad_() for heads in (4, 2, 2))
    out = kernel.flash_attn_func(q, k, v, causal=True)
    (dq,) = torch.autograd.grad(out, q, torch.randn_like(out))
    assert not dq[:, 0].any()
    assert dq[:, 1].any()


def test_gradients_of_keys_are_summed_over_blocks_in_float32(kernel, submodule) -> None:
    """Rounded to bfloat16 a block, they were 1.8 times as far off as one rounding."""
    q, do = torch.randn(2, 1, 2048, 1, 64).bfloat16()
    k, v = torch.randn(2, 1, 256, 1, 64).bfloat16()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    _, *gradients = torch.autograd.grad(kernel.flash_attn_func(*inputs), inputs, do)
    exact_inputs = [x.detach()[0].double().requires_grad_() for x in inputs]
    window = submodule("ops.attention.window").Window(-1, -1)
    exact, _ = submodule("ops.attention.reference").attention(*exact_inputs, 0.125, window)
    _, *exact_gradients = torch.autograd.grad(exact, exact_inputs, do[0].double())
    for got, exact_gradient in zip(gradients, exact_gradients, strict=True):
        rounding = (exact_gradient.bfloat16().double() - exact_gradient).norm()
        # The probabilities are rounded before the product, too.
        assert (got[0].double() - exact_gradient).norm() < 1.55 * rounding
