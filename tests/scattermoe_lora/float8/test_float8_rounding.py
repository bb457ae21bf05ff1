"""Rounding to float8: the numbers of the format, the mean of the number itself, and sums that keep both."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import TRITON

pytestmark = pytest.mark.skipif(TRITON, reason="plain torch operators: nothing for Triton to run")
Submodule = Callable[[str], ModuleType]


@pytest.fixture
def rounding(submodule: Submodule) -> ModuleType:
    return submodule("ops.float8.rounding")


def encoded(rounding: Any, matrix: torch.Tensor, kind: Any, stochastic: bool = False) -> Any:
    n, k = matrix.shape
    codes = torch.zeros(n, k, dtype=torch.uint8)
    scales = torch.zeros(rounding.blocks_of(n), rounding.blocks_of(k))
    rounding.encode(matrix, kind, codes, scales, stochastic=stochastic)
    return codes, scales


def spread(scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The scale of each element."""
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: like.shape[0], : like.shape[1]]


@pytest.mark.parametrize("name", ["E4M3", "E5M2"])
def test_nearest_is_torchs_own_cast_and_a_second_write_changes_nothing(rounding: Any, name: str) -> None:
    kind = getattr(rounding, name)
    # Magnitudes of 12 decades in one block: normal numbers, those below, and zeros.
    matrix = torch.randn(300, 260) * torch.logspace(-10, 2, 260)
    matrix[7], matrix[130, 1] = 0, -0.0
    codes, scales = encoded(rounding, matrix, kind)
    cast = (matrix / spread(scales, matrix)).to(kind.dtype)
    assert torch.equal(cast.view(torch.uint8), codes)
    decoded = rounding.decode(codes, scales, kind)
    assert torch.equal(decoded, cast.float() * spread(scales, matrix))

    # Its largest numbers doubled, every block has another scale, and the rest is rounded no second time.
    decoded[decoded.abs() >= decoded.abs().amax() / 2] *= 2
    decoded[decoded.abs() < 2.0 ** (2 - kind.bias) * spread(scales, matrix)] = 0
    for stochastic in (False, True):
        again, wider = encoded(rounding, decoded, kind, stochastic)
        assert not torch.equal(wider, scales)
        assert torch.equal(rounding.decode(again, wider, kind), decoded)

    for bad in (torch.inf, torch.nan):
        matrix[200, 5] = bad
        broken = rounding.decode(*encoded(rounding, matrix, kind, stochastic=True), kind)
        assert not broken[128:256, :128].isfinite().any()
        assert broken[:128].isfinite().all()


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "bfloat16"])
def test_stochastic_rounding_goes_to_a_neighbour_and_has_the_numbers_mean(rounding: Any, name: str) -> None:
    row = torch.randn(128) * torch.logspace(-6, 0, 128)
    row[-1] = 3.0
    matrix, draws = row.repeat(4096, 1), 4096
    if name == "bfloat16":
        result = rounding.round_to_bfloat16(matrix).float()
        step = row.abs() * 2**-7
    else:
        kind = getattr(rounding, name)
        codes, scales = encoded(rounding, matrix, kind, stochastic=True)
        result = rounding.decode(codes, scales, kind)
        step = torch.maximum(row.abs(), 2.0 ** (1 - kind.bias) * scales[0, 0]) * 2.0**-kind.mantissa
    assert bool(((result - row).abs() < step).all())
    assert len(result[:, 5].unique()) == 2
    # Of a draw the variance is at most a quarter of the step's square.
    assert bool(((result.mean(0) - row).abs() < 5 * step / 2 / draws**0.5).all())


def test_an_accumulated_gradient_keeps_its_error_bound_and_its_mean(submodule: Submodule) -> None:
    kind = submodule("ops.float8.gradient").Float8Gradient
    terms = [torch.randn(128) * torch.logspace(-4, 0, 128) for _ in range(8)]
    copies = 2048
    gradient = kind.from_dense(terms[0].repeat(copies, 1), stochastic=True)
    exact, variance = terms[0], (terms[0] / 4).square()
    for term in terms[1:]:
        before = gradient.dequantize()
        gradient += term if term is terms[1] else term.repeat(copies, 1)
        wanted, scale = before + term, gradient.scales.amax()
        # One addition: a quarter of the sum, or the step below the normal numbers.
        limit = torch.maximum(wanted.abs() / 4, 2.0**-16 * scale)
        assert bool(((gradient.dequantize() - wanted).abs() <= limit).all())
        exact = exact + term
        variance = variance + limit.square().mean(0)
    deviation = (variance / copies).sqrt()
    assert bool(((gradient.dequantize().mean(0) - exact).abs() < 5 * deviation).all())


def test_clipping_multiplies_scales_alone_and_norms_are_those_of_the_decoded(submodule: Submodule) -> None:
    kind = submodule("ops.float8.gradient").Float8Gradient
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((40, 130), (3, 20, 30), (7,))]
    for parameter in parameters:
        dense = torch.randn(parameter.shape)
        parameter.grad = dense if dense.dim() == 1 else kind.from_dense(dense, stochastic=True)
    decoded = [torch.nn.Parameter(torch.zeros_like(p)) for p in parameters]
    for parameter, copy in zip(parameters, decoded, strict=True):
        copy.grad = parameter.grad.dequantize().clone()
    codes = parameters[0].grad.codes.clone()
    for order in (2.0, torch.inf, 1.0):
        norms = [torch.nn.utils.clip_grad_norm_(ps, 0.5, norm_type=order) for ps in (parameters, decoded)]
        torch.testing.assert_close(*norms)
    assert torch.equal(parameters[0].grad.codes, codes)
    for parameter, copy in zip(parameters[:2], decoded, strict=False):
        torch.testing.assert_close(parameter.grad.dequantize(), copy.grad)
