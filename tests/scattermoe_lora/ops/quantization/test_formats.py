"""Each format decodes to the bit as its library does. Runs natively, and in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bits import DTYPES, every_code, same_bits

pytestmark = pytest.mark.usefixtures("bfloat16")


def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("shape", [(3, 64, 128), (4, 70, 66), (1, 5, 2), (3, 33, 704)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_decodes_the_same_bits(quantization, decoded, kind, nested, shape) -> None:
    functional = bitsandbytes().functional
    for block in (32, 64, 256, 4096):
        # With AVX-512, bitsandbytes takes the scale of another block where a block does not end with a row: its results
        # for one block in a row are those that it gives on a GPU.
        for dtype in DTYPES:
            weight = (torch.randn(shape) * torch.rand(shape[0], shape[1], 1).exp()).to(dtype)
            codes, state = functional.quantize_4bit(
                weight, blocksize=block, quant_type=kind, compress_statistics=nested
            )
            stack = quantization("bitsandbytes").read_quant_state(codes, state, "gate_up_proj")
            assert (stack.shape, stack.dtype) == (weight.shape, dtype)
            expected = by_block(functional, codes, state, weight.numel()).view(shape)
            assert same_bits(decoded(stack), expected)


def by_block(functional: Any, codes: torch.Tensor, state: Any, size: int) -> torch.Tensor:
    """What bitsandbytes decodes, given a block as a row; those that it cannot take so are given whole."""
    if size % state.blocksize:
        columns, state.shape = state.shape, torch.Size((1, size))
    else:
        columns, state.shape = state.shape, torch.Size((size // state.blocksize, state.blocksize))
    dense = functional.dequantize_4bit(codes, state)
    state.shape = columns
    return dense.reshape(-1)[:size]


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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("factor", [None, (), (3, 1, 1)], ids=str)
def test_nvfp4_decodes_as_torchao_does(quantization, decoded, factor, transposed) -> None:
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    scale = None if factor is None else torch.rand(factor) / 100
    tensor = nvfp4.NVFP4Tensor.to_nvfp4(torch.randn(3, 32, 80, dtype=torch.bfloat16), per_tensor_scale=scale)
    if transposed:
        tensor = tensor.transpose(-2, -1)
    stack = quantization("torchao").read_torchao(torch.nn.Parameter(tensor, requires_grad=False), "down_proj")
    assert stack.shape == tensor.shape
    assert same_bits(decoded(stack), tensor.dequantize())


@pytest.mark.parametrize("element", [torch.float8_e4m3fn, torch.float4_e2m1fn_x2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mx_tensors_decode_as_torchao_does(quantization, decoded, element, dtype) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    tensor = mx.MXTensor.to_mx(torch.randn(3, 32, 96, dtype=dtype), element, 32)
    stack = quantization("torchao").read_torchao(tensor, "down_proj")
    assert same_bits(decoded(stack), tensor.dequantize())


def test_float8_tensors_decode_as_torchao_does(quantization, decoded) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    weight = torch.randn(3, 256, 128, dtype=torch.bfloat16)
    for granularity in (torchao.PerTensor(), torchao.PerRow(), torchao.PerBlock([1, 128, 128])):
        tensor = torchao.Float8Tensor.from_hp(weight, granularity=granularity)
        stack = quantization("torchao").read_torchao(tensor, "down_proj")
        assert same_bits(decoded(stack), tensor.dequantize())


def test_a_parametrized_parameter_is_read_without_evaluating_it(quantization, decoded, monkeypatch) -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    read = quantization("bitsandbytes").read_parametrized
    module = torch.nn.Module()
    module.up = torch.nn.Parameter(torch.randn(3, 32, 64, dtype=torch.bfloat16))
    assert read(module, "up") is None
    parametrize.replace_parameter_4bit(module, "up", compress_statistics=True)
    dense = module.up
    monkeypatch.setattr(parametrize.Bnb4bitParametrization, "forward", None)
    assert same_bits(decoded(read(module, "up")), dense)
