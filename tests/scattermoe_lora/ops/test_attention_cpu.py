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
    x, low, low_right = torch.randn(16, 48), torch.randn(16, 4), torch.randn(4, 32)
    with Weights() as weights:
        got = [
            cpu_matmul.matmul(x, right, torch.empty(16, 32)),
            cpu_matmul.add_matmul(x, right, torch.ones(16, 32)),
            cpu_matmul.low_rank_matmul(x, right, low, low_right, torch.empty(16, 32)),
        ]
    assert weights.dense == [True] * len(got)
    product = x.double() @ right.double()
    assert_close(got, [product, product + 1, product + low.double() @ low_right.double()], 1e-5)
