"""Each format decodes to the bit as its library does. Runs natively, and in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bits import DTYPES, every_code, same_bits

pytestmark = pytest.mark.usefixtures("bfloat16")


# Shape, block size and rows and columns of scales; None: one scale for each tensor or channel.
GRIDS = [
    ((2, 128, 256), (128, 128), (1, 2)),
    ((3, 64, 96), (128, 128), (1, 1)),
    ((2, 40, 36), (8, 12), (5, 3)),
    ((2, 40, 36), None, (1, 1)),
    ((2, 40, 36), None, (40, 1)),
    ((2, 40, 36), None, (1, 36)),
    ((2, 64, 36), None, (2, 1)),
]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize(("shape", "block", "grid"), GRIDS, ids=str)
def test_float8_decodes_as_transformers_dequantizes(
    quantization, decoded, shape, block, grid, scale_dtype
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = every_code(*shape).view(torch.float8_e4m3fn)
    scales = torch.rand(shape[0], *grid).mul(3).exp().to(scale_dtype)
    for dtype in DTYPES:
        stack = quantization("float8").read_float8(codes, scales, "down_proj", block_size=block, dtype=dtype)
        expected = Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
        assert same_bits(decoded(stack), expected)
    as_bytes = scales.view(torch.uint8) if scale_dtype.itemsize == 1 else scales
    assert same_bits(
        decoded(quantization("float8").read_float8(codes, as_bytes, "w", block_size=block, dtype=dtype)),
        expected,
    )


def test_float8_blocks_that_end_with_the_matrix_are_smaller(quantization, decoded) -> None:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    codes = torch.randn(3, 70, 45).to(torch.float8_e4m3fn)
    scales = torch.randn(3, 3, 2).exp2().log2().exp2()
    stack = quantization("float8").read_float8(
        codes, scales, "down_proj", block_size=(32, 32), dtype=torch.float32
    )
    assert same_bits(decoded(stack), _dequantize_fp8_weight(codes, scales, (32, 32), torch.float32))


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("expert_dtype", ["fp8", "fp4"])
@pytest.mark.parametrize("block", [None, (128, 128), (16, 16)], ids=str)
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 32), (128, 128)])
def test_parameters_of_transformers_fp8_experts_are_read(
    quantization, decoded, hidden, intermediate, block, expert_dtype, scale_fmt
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Experts

    config = SimpleNamespace(
        hidden_size=hidden, num_experts=3, moe_intermediate_size=intermediate, hidden_act="silu"
    )
    module = FP8Experts(config, block, scale_fmt=scale_fmt, expert_dtype=expert_dtype)
    for name, parts in (("gate_up_proj", 2), ("down_proj", 1)):
        weight, scales = getattr(module, name).detach(), getattr(module, f"{name}_scale_inv").detach()
        weight.view(torch.uint8).copy_(every_code(*weight.shape))
        scales.copy_(torch.rand(scales.shape).exp())
        if expert_dtype == "fp4":
            stack = quantization("float4").read_float4(weight, scales, name)
        else:
            stack = quantization("float8").read_float8(weight, scales, name, block_size=block, parts=parts)
        assert list(stack.shape) == [
            3,
            *([2 * intermediate, hidden] if parts == 2 else [hidden, intermediate]),
        ]
        assert same_bits(decoded(stack), Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16))


def test_mxfp4_decodes_as_transformers_converts_gpt_oss(quantization, decoded) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = every_code(3, 48, 5 * 16).view(3, 48, 5, 16)
    scales = torch.randint(0, 255, (3, 48, 5), dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float32):
        stack = quantization("float4").read_mxfp4(blocks, scales, "gate_up_proj", dtype)
        expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert same_bits(decoded(stack), expected.mT.contiguous())
        assert same_bits(decoded(stack.mT).contiguous(), expected)
