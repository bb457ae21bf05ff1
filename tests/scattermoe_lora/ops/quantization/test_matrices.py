"""Products with quantized stacks: those of the decoded matrices, which on a CPU never exist all at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocations import Allocations
from bits import every_code
from helpers import error

pytestmark = pytest.mark.usefixtures("bfloat16")

EXPERTS, N, K = 7, 96, 64


@pytest.fixture(params=["nf4", "nested nf4", "float8", "mxfp4", "transposed float8"])
def stack(request, quantization) -> Any:
    formats, kind = quantization("formats"), request.param
    make = quantization("stack").QuantizedStack
    if "nf4" in kind:
        blocks = EXPERTS * N * K // 64
        scales: tuple[torch.Tensor, ...] = (torch.rand(blocks),)
        if "nested" in kind:
            codes = torch.randint(256, (blocks,), dtype=torch.uint8)
            scales = (codes, torch.rand(256), torch.rand(-(-blocks // 256)), torch.rand(()))
        layout = formats.Format("nf4", 0, 64, 256 if "nested" in kind else 0)
    elif kind == "mxfp4":
        layout, scales = formats.Format("e2m1", 1, 32), (torch.rand(EXPERTS, N, K // 32),)
    else:
        layout, scales = formats.Format("e4m3", 32, 32), (torch.rand(EXPERTS, N // 32, K // 32) / 100,)
    codes = every_code(EXPERTS, N, K // layout.codes_per_byte)
    if layout.element == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 0
    made = make(codes, scales, layout, torch.float32).check("w")
    return made.mT if "transposed" in kind else made


def linear_operands(submodule: Any, x: torch.Tensor, weight: Any, rows: list[int]) -> Any:
    """Consecutive rows, so many for each expert; those behind the last one's have no expert."""
    index = torch.full((x.shape[0], 1), EXPERTS)
    index[: sum(rows), 0] = torch.arange(EXPERTS).repeat_interleave(torch.tensor(rows))
    routing = submodule("ops.routing").sort_by_expert(index, EXPERTS)
    return submodule("ops.grouped_linear.arguments").Operands(x, weight, None, None, None, *routing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_are_those_of_the_decoded_matrices(
    submodule, quantization, stack, dtype
) -> None:
    rows = [3, 0, 17, 1, 0, 40, 5]
    dense = quantization("reference").decode(stack, dtype).double()
    x = torch.randn(70, stack.shape[2]).to(dtype).requires_grad_()
    got, _ = submodule("ops.grouped_linear.op").linear(linear_operands(submodule, x, stack, rows), 1, True)
    grad = torch.randn_like(got)
    expert = torch.arange(EXPERTS).repeat_interleave(torch.tensor(rows))
    for result, rows_in, matrices in (
        (got, x, dense),
        (torch.autograd.grad(got, x, grad)[0], grad, dense.mT),
    ):
        expected = torch.bmm(
            matrices[expert], rows_in[: len(expert)].detach().double().unsqueeze(-1)
        ).squeeze(-1)
        assert result.dtype == dtype
        assert error(result[: len(expert)], expected) < (1e-6 if dtype == torch.float32 else 1e-2)
        assert torch.equal(result[len(expert) :], torch.zeros(4, result.shape[1], dtype=dtype))


@pytest.mark.parametrize("busy", [1, EXPERTS])
def test_one_matrix_is_held_at_a_time_and_only_those_with_rows_are_decoded(
    submodule, quantization, stack, busy, monkeypatch
) -> None:
    cpu = quantization("cpu")
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", N * K)
    decoded: list[int] = []
    decode = cpu.Decoder.decode
    monkeypatch.setattr(
        cpu.Decoder, "decode", lambda self, e, out: (decoded.append(e), decode(self, e, out))[1]
    )
    x = torch.randn(busy, stack.shape[2])
    peaks = []
    for weight in (stack, torch.randn(stack.shape)):
        operands = linear_operands(submodule, x, weight, [1] * busy + [0] * (EXPERTS - busy))
        with Allocations() as allocations:
            submodule("ops.grouped_linear.cpu").forward(operands, 1)
        peaks.append(allocations.peak)
    assert decoded == list(range(busy))
    # The workspace, and codes on their way to numbers, of at most 4 bytes an element.
    matrix = N * K * 4
    assert matrix <= peaks[0] - peaks[1] < 2.3 * matrix


def test_matrices_are_asked_for_one_at_a_time(quantization, stack) -> None:
    matrices = quantization("cpu").Matrices(stack, torch.float32)
    assert len(matrices) == EXPERTS
    assert torch.equal(matrices[2], quantization("reference").decode(stack)[2])
    with pytest.raises(TypeError, match="share a workspace: ask for one at a time"):
        matrices[:2]
