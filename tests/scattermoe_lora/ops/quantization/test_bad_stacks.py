"""Quantized weights whose parts do not fit together are refused, by parameter, with expected and got."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def float8(**changes: Any) -> dict[str, Any]:
    """Arguments of ``read_float8`` that fit together but for ``changes``."""
    codes = torch.ones(2, 256, 384).to(torch.float8_e4m3fn)
    return {
        "codes": codes,
        "scales": torch.ones(2, 2, 3),
        "name": "down_proj",
        "block_size": (128, 128),
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"scales": torch.ones(2, 3, 2)},
            ValueError,
            r"down_proj_scale_inv: expected \[2, 2, 3\] for blocks of 128 x 128, got \[2, 3, 2\]",
        ),
        ({"block_size": (64, 64)}, ValueError, r"expected \[2, 4, 6\] for blocks of 64 x 64, got \[2, 2, 3\]"),
        ({"scales": torch.ones(4, 2, 3)}, ValueError, r"expected scales.* shape \[2, 2, 3\], got \[4, 2, 3\]"),
        ({"scales": torch.ones(2)}, ValueError, r"down_proj_scale_inv: expected \[E, R, C\], got \[2\]"),
        (
            {"scales": torch.ones(2, 2, 3, dtype=torch.float64)},
            ValueError,
            r"down_proj: expected dtype of its scales among .*, got torch.float64",
        ),
        (
            {"scales": torch.ones(2, 2, 3, device="meta")},
            ValueError,
            r"down_proj: expected device of its scales cpu, got meta",
        ),
        (
            {"codes": torch.ones(2, 256, 384).to(torch.float8_e5m2)},
            NotImplementedError,
            r"down_proj: expected float8_e4m3fn, got torch.float8_e5m2",
        ),
        (
            {"codes": torch.ones(256, 384).to(torch.float8_e4m3fn)},
            ValueError,
            r"down_proj: expected \[E, N, K\], got \[256, 384\]",
        ),
        (
            {"block_size": None, "scales": torch.ones(2, 5, 1)},
            ValueError,
            r"expected numbers of scales that divide 256 and 384, got \[2, 5, 1\]",
        ),
        (
            {"block_size": (96, 128), "scales": torch.ones(2, 4, 3), "parts": 2},
            NotImplementedError,
            r"blocks of 96 rows that do not cross from one of the 2 matrices of 128 rows to the next",
        ),
        ({"dtype": torch.float64}, ValueError, r"expected the dtype it stands for among .*, got torch.float64"),
    ],
)  # fmt: skip
def test_float8_that_does_not_fit_is_refused_by_name(quantization, changes, kind, message) -> None:
    assert quantization("float8").read_float8(**float8())
    with pytest.raises(kind, match=message):
        quantization("float8").read_float8(**float8(**changes))


@pytest.mark.parametrize(
    ("codes", "scales", "options", "message"),
    [
        ((2, 8, 32), (2, 8, 3), {}, r"w: expected scales, one for 1 x 32 .* shape \[2, 8, 2\], got \[2, 8, 3\]"),
        ((2, 8, 32), (2, 2, 8), {}, r"of shape \[2, 8, 2\], got \[2, 2, 8\]"),
        ((2, 8, 24), (2, 8, 2), {}, r"w: expected rows of a multiple of 32 elements, got 48"),
        ((8, 32), (8, 2), {}, r"w: expected \[E, N, K // 2\] of one byte each, got \[8, 32\]"),
        (
            (2, 8, 32),
            (2, 8, 2),
            {"factor": torch.ones(3)},
            r"w: expected a scale for the stack or for 2 experts, got \[3\]",
        ),
    ],
)  # fmt: skip
def test_float4_that_does_not_fit_is_refused_by_name(quantization, codes, scales, options, message) -> None:
    packed, exponents = torch.zeros(codes, dtype=torch.uint8), torch.zeros(scales, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        quantization("float4").read_float4(packed, exponents, "w", **options)


def test_mxfp4_that_does_not_fit_is_refused_by_name(quantization) -> None:
    read = quantization("float4").read_mxfp4
    blocks, scales = torch.zeros(2, 8, 3, 16, dtype=torch.uint8), torch.zeros(2, 8, 3, dtype=torch.uint8)
    assert read(blocks, scales, "w").shape == (2, 8, 96)
    with pytest.raises(
        ValueError, match=r"w_blocks: expected \[E, N, K // 32, 16\] of torch.uint8, got \[2, 8, 48\]"
    ):
        read(blocks.flatten(2), scales, "w")
    with pytest.raises(ValueError, match=r"w_scales: expected \[2, 8, 3\] of torch.uint8, got \[2, 3, 8\]"):
        read(blocks, scales.mT, "w")


def test_scales_that_are_not_finite_are_refused_where_weights_are_loaded(quantization) -> None:
    for bad in (float("nan"), float("inf")):
        scales = torch.ones(2, 2, 3)
        scales[1, 0, 2] = bad
        stack = quantization("float8").read_float8(**float8(scales=scales))
        with pytest.raises(
            ValueError, match=r"down_proj: expected finite scales, got 1 that are NaN or infinite"
        ):
            stack.refuse_nan("down_proj")
    exponents = torch.full((2, 8, 3), 255, dtype=torch.uint8)
    stack = quantization("float4").read_float4(torch.zeros(2, 8, 48, dtype=torch.uint8), exponents, "w")
    with pytest.raises(ValueError, match="w: expected finite scales, got 48 that are NaN or infinite"):
        stack.refuse_nan("w")
