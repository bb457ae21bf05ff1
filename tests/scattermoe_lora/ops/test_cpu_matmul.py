"""The CPU's products through oneDNN, which the other tests' sizes are too small for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import AWKWARD, Shape, assert_close, low_rank
from test_experts import BOTH, exact, problem, run

# Three experts of dozens of rows, wide enough for oneDNN in every product.
WIDE = Shape(tokens=60, experts=3, top_k=2, hidden=256, intermediate=256, rank=70)


@pytest.mark.parametrize("shape", AWKWARD)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("elements", [200, 1 << 18])
def test_products_of_any_size_through_onednn_match_the_reference(
    kernel,
    submodule,
    monkeypatch: pytest.MonkeyPatch,
    shape: Shape,
    dtype: torch.dtype,
    tolerance: float,
    elements: int,
) -> None:
    # At these sizes every float32 product would be left to torch.mm.
    cpu_matmul = submodule("ops.cpu_matmul")
    monkeypatch.setattr(cpu_matmul, "_LARGE", 1)
    monkeypatch.setattr(submodule("ops.experts.cpu"), "_CHUNK_ELEMENTS", elements)
    row_counts = []
    widened = cpu_matmul._widened

    def watched(x: torch.Tensor, rows: int) -> torch.Tensor | None:
        result = widened(x, rows)
        if result is not None:
            row_counts.append(result.shape[0])
        return result

    monkeypatch.setattr(cpu_matmul, "_widened", watched)
    arguments = problem(shape, "silu", dtype, targets=BOTH, train_base=False, sentinels=True)
    assert_close(run(kernel, *arguments), exact(submodule, *arguments, "silu"), tolerance)
    if cpu_matmul._serves(dtype, 1):
        assert row_counts
        assert all(rows % 16 == 0 for rows in row_counts)


def test_pieces_cover_the_rows_with_few_sizes(submodule) -> None:
    cpu_matmul = submodule("ops.cpu_matmul")
    sizes = set()
    for rows in range(1, 3000):
        pieces = cpu_matmul.pieces(rows)
        assert sum(pieces[:-1]) < rows <= sum(pieces) == cpu_matmul.rounded(rows) < rows + 16
        sizes.update(pieces)
    assert sizes == {16, 32, 48, 64, 80, 96, 112, 128, 256}


@pytest.mark.parametrize("rows", [1, 16, 127, 129, 200, 300, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_many_pieces_are_whole(submodule, rows: int, dtype: torch.dtype) -> None:
    cpu_matmul = submodule("ops.cpu_matmul")
    x = torch.randn(cpu_matmul.rounded(rows), 96).to(dtype)[:rows]
    weight, before = (
        torch.randn(104, 96).to(dtype),
        torch.randn(cpu_matmul.rounded(rows), 104).to(dtype)[:rows],
    )
    exact_product = x.double() @ weight.double().T
    sums = before.new_empty((cpu_matmul.rounded(rows), 104))[:rows].copy_(before)
    low, low_right = torch.randn(rows, 5).to(dtype), torch.randn(104, 5).to(dtype).t()
    both = torch.empty(cpu_matmul.rounded(rows), 104).to(dtype)[:rows]
    got = [
        cpu_matmul.matmul(x, weight.t(), torch.empty(rows, 104).to(dtype)),
        cpu_matmul.add_matmul(x, weight.t(), sums),
        cpu_matmul.low_rank_matmul(x, weight.t(), low, low_right, both),
    ]
    expected = [
        exact_product, exact_product + before.double(), exact_product + low.double() @ low_right.double()
    ]  # fmt: skip
    assert_close(got, expected, 1e-5 if dtype == torch.float32 else 1e-2)


def test_equal_calls_give_equal_bits(kernel) -> None:
    arguments = problem(WIDE, "silu", torch.float32, targets=BOTH, train_base=True, sentinels=True)
    for first, second in zip(run(kernel, *arguments), run(kernel, *arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_and_without_gradients_the_output_has_the_same_bits(
    kernel, submodule, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    # Checkpointing runs the forward without, and again with.
    monkeypatch.setattr(submodule("ops.cpu_matmul"), "_LARGE", 1)
    arguments = problem(WIDE, "silu", dtype, targets=BOTH, train_base=False, sentinels=True)
    with torch.no_grad():
        without = kernel.experts_forward(*arguments[:4], lora=arguments[4])
    assert torch.equal(kernel.experts_forward(*arguments[:4], lora=arguments[4]), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_behind_an_experts_own_do_not_reach_its_results(submodule, dtype: torch.dtype) -> None:
    cpu_matmul = submodule("ops.cpu_matmul")
    buffer, weight = torch.full((32, 300), float("nan")).to(dtype), torch.randn(200, 300).to(dtype)
    x = buffer[:19].normal_()
    sums = torch.full((32, 200), float("nan")).to(dtype)
    before = torch.randn(19, 200).to(dtype)
    sums[:19] = before
    exact_product = x.double() @ weight.double().T
    got = cpu_matmul.matmul(x, weight.t(), torch.empty(19, 200).to(dtype))
    added = cpu_matmul.add_matmul(x, weight.t(), sums[:19])
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close([got, added], [exact_product, exact_product + before.double()], rounding)
    assert sums[19:].isnan().all()


@pytest.mark.parametrize("switch", ["is_available", "enabled"])
def test_without_onednn_torch_mm_serves(
    kernel, submodule, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    def absent(*_: Any) -> None:
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(submodule("ops.cpu_matmul"), "_LARGE", 1)
    monkeypatch.setattr(submodule("ops.cpu_matmul"), "_widened", absent)
    with torch.backends.mkldnn.flags(enabled=switch != "enabled"):
        if switch == "is_available":
            monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        arguments = problem(AWKWARD[1], "silu", torch.float32, targets=BOTH, train_base=False, sentinels=True)
        assert_close(run(kernel, *arguments), exact(submodule, *arguments, "silu"), 2e-5)
        # A module, x, ... in bfloat16 take the same way.
        a, b = (f.bfloat16() for f in low_rank(5, 40, 33, 3))
        x, weight = torch.randn(7, 33).bfloat16(), torch.randn(5, 40, 33).bfloat16()
        assert kernel.grouped_linear(x, weight, torch.zeros(7, 1, dtype=torch.long), a, b).isfinite().all()
