"""The CPU's blocks of padded rows, and its products through oneDNN, which the other tests' sizes are too small for."""

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
@pytest.mark.parametrize("block_bytes", [800, 1 << 20])
@pytest.mark.parametrize("onednn", [True, False])
def test_products_of_any_size_through_either_library_match_the_reference(
    kernel,
    submodule,
    monkeypatch: pytest.MonkeyPatch,
    shape: Shape,
    dtype: torch.dtype,
    tolerance: float,
    block_bytes: int,
    onednn: bool,
) -> None:
    # At these sizes every float32 product would be left to torch's own choice.
    cpu_matmul, projections = submodule("ops.cpu_matmul"), submodule("ops.grouped_linear.cpu")
    monkeypatch.setattr(cpu_matmul, "_LARGE", 1)
    monkeypatch.setattr(cpu_matmul, "prefers_onednn", lambda: onednn and cpu_matmul.has_onednn())
    monkeypatch.setattr(submodule("ops.cpu_blocks"), "_BLOCK_BYTES", block_bytes)
    row_counts = []

    def watched(x: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        row_counts.append(x.shape[0])
        return cpu_matmul.add_matmul(x, right, out)

    monkeypatch.setattr(projections, "add_matmul", watched)
    arguments = problem(shape, "silu", dtype, targets=BOTH, train_base=False, sentinels=True)
    assert_close(run(kernel, *arguments), exact(submodule, *arguments, "silu"), tolerance)
    assert row_counts
    assert all(rows % 8 == 0 for rows in row_counts)


@pytest.mark.parametrize(
    "counts", [[0], [3], [0, 0, 5, 0], [1] * 64, [40, 31, 64, 17] * 8, [900, 1, 1, 0, 2, 700]]
)
@pytest.mark.parametrize("row_bytes", [4, 4000, 1 << 24])
def test_blocks_hold_every_row_once_and_little_padding(submodule, counts: list[int], row_bytes: int) -> None:
    cpu_blocks = submodule("ops.cpu_blocks")
    offsets = torch.tensor([0, *counts]).cumsum(0)
    # Two pairs have no expert.
    order = torch.randperm(sum(counts) + 2)
    by_block, blocks = cpu_blocks.split(order, offsets, row_bytes)
    assert torch.equal(by_block[-2:], order[-2:])
    experts = [expert for block in blocks for expert in block.experts]
    assert sorted(experts) == [expert for expert, count in enumerate(counts) if count]
    rows = [order[offsets[expert] : offsets[expert + 1]] for expert in experts]
    assert torch.equal(by_block[:-2], torch.cat([*rows, order[:0]]))
    positions = [p for block in blocks for p in range(block.positions.start, block.positions.stop)]
    assert positions == list(range(sum(counts)))
    for block in blocks:
        assert block.counts == [counts[expert] for expert in block.experts]
        assert block.rows <= 1.5 * cpu_blocks.padded(min(block.counts))
        assert len(block.counts) == 1 or block.size * row_bytes <= cpu_blocks._BLOCK_BYTES


def test_rows_of_a_block_are_gathered_and_returned_in_order(submodule) -> None:
    cpu_blocks = submodule("ops.cpu_blocks")
    counts = [20, 18, 0, 32, 17]
    order, (block,) = cpu_blocks.split(torch.arange(sum(counts)), torch.tensor([0, *counts]).cumsum(0), 1)
    assert block.experts == [3, 0, 1, 4]
    source, index = torch.randn(9, 4), torch.randint(9, (sum(counts),))[order]
    rows = block.gather(source, index, torch.full((200, 4), float("nan")))
    assert torch.equal(block.own(rows), source[index])
    for by_expert, own, count in zip(
        block.by_expert(rows), index.split(block.counts), block.counts, strict=True
    ):
        assert torch.equal(by_expert[:count], source[own])
        assert not by_expert[count:].any()


def test_rows_are_rounded_to_few_sizes(submodule) -> None:
    cpu_matmul, cpu_blocks = submodule("ops.cpu_matmul"), submodule("ops.cpu_blocks")
    for rows in range(3000):
        assert rows <= cpu_matmul.rounded(rows) < rows + 8
        assert cpu_matmul.rounded(rows) <= cpu_blocks.padded(rows) < rows + max(16, rows / 8 + 1)
    assert len({cpu_blocks.padded(rows) for rows in range(129, 4097)}) == 5 * 8


@pytest.mark.parametrize("rows", [1, 16, 127, 129, 200, 300, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("onednn", [True, False])
def test_products_of_many_pieces_are_whole(
    submodule, monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, onednn: bool
) -> None:
    cpu_matmul = submodule("ops.cpu_matmul")
    monkeypatch.setattr(cpu_matmul, "_LARGE", 1)
    monkeypatch.setattr(cpu_matmul, "prefers_onednn", lambda: onednn and cpu_matmul.has_onednn())
    x, weight, before = (torch.randn(*size).to(dtype) for size in ((rows, 96), (104, 96), (rows, 104)))
    expected = before.double() + x.double() @ weight.double().T
    got = cpu_matmul.add_matmul(x, weight.t(), before.clone())
    assert_close([got], [expected], 1e-5 if dtype == torch.float32 else 1e-2)


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
def test_rows_that_pad_carry_nothing_from_one_expert_to_another(kernel, dtype: torch.dtype) -> None:
    """A token of NaN reaches its own experts' gradients alone, though every expert's rows are padded in one buffer."""
    x, weight = torch.randn(24, 32).to(dtype), torch.randn(6, 40, 32).to(dtype)
    a, b = (f.to(dtype).requires_grad_() for f in low_rank(6, 40, 32, 3))
    index = torch.arange(24).remainder(6).unsqueeze(1)
    x[5] = float("nan")
    y = kernel.grouped_linear(x, weight, index, a, b)
    y.sum().backward()
    for gradient in (a.grad, b.grad):
        assert gradient[:5].isfinite().all()
        assert gradient[5].isnan().any()
    assert y.isfinite().flatten(1).all(dim=1).equal(torch.arange(24) != 5)


@pytest.mark.parametrize(
    ("capability", "amx", "serves"),
    [
        ("AVX512", False, True),
        ("AVX2", False, True),
        ("AVX512", True, False),
        ("SVE256", False, False),
        ("DEFAULT", False, False),
    ],
)
def test_the_processor_decides_which_library_multiplies_float32(
    submodule, monkeypatch: pytest.MonkeyPatch, capability: str, amx: bool, serves: bool
) -> None:
    cpu_matmul = submodule("ops.cpu_matmul")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert cpu_matmul.prefers_onednn() == (serves and cpu_matmul.has_onednn())


@pytest.mark.parametrize("switch", ["is_available", "enabled"])
def test_without_onednn_torch_mm_serves(
    kernel, submodule, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    def absent(*_: Any) -> None:
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(submodule("ops.cpu_matmul"), "_LARGE", 1)
    monkeypatch.setattr(submodule("ops.cpu_matmul"), "onednn_layout", absent)
    with torch.backends.mkldnn.flags(enabled=switch != "enabled"):
        if switch == "is_available":
            monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        arguments = problem(AWKWARD[1], "silu", torch.float32, targets=BOTH, train_base=False, sentinels=True)
        assert_close(run(kernel, *arguments), exact(submodule, *arguments, "silu"), 2e-5)
        # A module, x, ... in bfloat16 take the same way.
        a, b = (f.bfloat16() for f in low_rank(5, 40, 33, 3))
        x, weight = torch.randn(7, 33).bfloat16(), torch.randn(5, 40, 33).bfloat16()
        assert kernel.grouped_linear(x, weight, torch.zeros(7, 1, dtype=torch.long), a, b).isfinite().all()
