"""Weights that torchao quantized: decoded to its bits, and trained as it keeps them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from bits import same_bits
from helpers import experts_module
from quantized_modules import SHAPE, WEIGHTS, assert_adapts_as_dense, assert_computes_as_dense
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.quantization import Float8Tensor, PerBlock, PerRow, PerTensor
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("factor", [None, (), (3, 1, 1)], ids=str)
def test_nvfp4_decodes_as_torchao_does(quantization, decoded, factor, transposed) -> None:
    scale = None if factor is None else torch.rand(factor) / 100
    tensor = NVFP4Tensor.to_nvfp4(torch.randn(3, 32, 80, dtype=torch.bfloat16), per_tensor_scale=scale)
    if transposed:
        tensor = tensor.transpose(-2, -1)
    stack = quantization("torchao").read_torchao(torch.nn.Parameter(tensor, requires_grad=False), "down_proj")
    assert stack.shape == tensor.shape
    assert same_bits(decoded(stack), tensor.dequantize())


@pytest.mark.parametrize("element", [torch.float8_e4m3fn, torch.float4_e2m1fn_x2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mx_tensors_decode_as_torchao_does(quantization, decoded, element, dtype) -> None:
    tensor = MXTensor.to_mx(torch.randn(3, 32, 96, dtype=dtype), element, 32)
    stack = quantization("torchao").read_torchao(tensor, "down_proj")
    assert same_bits(decoded(stack), tensor.dequantize())


def test_float8_tensors_decode_as_torchao_does(quantization, decoded) -> None:
    weight = torch.randn(3, 256, 128, dtype=torch.bfloat16)
    for granularity in (PerTensor(), PerRow(), PerBlock([1, 128, 128])):
        tensor = Float8Tensor.from_hp(weight, granularity=granularity)
        stack = quantization("torchao").read_torchao(tensor, "down_proj")
        assert same_bits(decoded(stack), tensor.dequantize())


def test_torchao_tensors_of_other_kinds_are_refused_and_plain_ones_are_not_torchaos(quantization) -> None:
    read = quantization("torchao").read_torchao
    assert read(torch.randn(2, 3, 4), "w") is None
    weight = torch.randn(2, 128, 64, dtype=torch.bfloat16)
    swizzled = NVFP4Tensor.to_nvfp4(weight, is_swizzled_scales=True)
    with pytest.raises(
        NotImplementedError, match="w: expected scales in the order of rows, got NVFP4Tensor with swizzled"
    ):
        read(swizzled, "w")
    turned = Float8Tensor.from_hp(weight[:, :64], granularity=PerRow())
    turned.scale = turned.scale.mT
    with pytest.raises(ValueError, match=r"expected \[2, 64, 1\] for blocks of 1 x 64, got \[2, 1, 64\]"):
        read(turned, "w")
    with pytest.raises(NotImplementedError, match=r"w: expected float8_e4m3fn, got torch.float8_e5m2"):
        read(MXTensor.to_mx(weight, torch.float8_e5m2, 32), "w")
    flat = NF4Tensor.from_tensor(torch.randn(256, 256), 64, 256)
    with pytest.raises(NotImplementedError, match=r"w: expected one of torchao's .*, got NF4Tensor"):
        read(flat, "w")


@pytest.mark.filterwarnings("ignore::UserWarning:torchao", "ignore::FutureWarning")
def test_experts_of_mx_tensors_compute_and_adapt_as_dense_ones(
    registered: ModuleType, submodule: Any
) -> None:
    module = experts_module(SHAPE)
    for name in WEIGHTS:
        tensor = MXTensor.to_mx(getattr(module, name).data, torch.float8_e4m3fn, block_size=32)
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    assert_computes_as_dense(registered, submodule, module)
    assert_adapts_as_dense(submodule, module)
