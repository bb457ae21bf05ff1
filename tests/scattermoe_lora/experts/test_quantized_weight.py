"""A quantized weight is a parameter of the dense weight's shape and dtype, and never a silent dense copy."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

SHAPE = (4, 6, 32)
FORMATS = ["nf4", "fp4", "fp8", "nvfp4", "nested"]


@pytest.fixture
def weight(submodule: Callable[[str], Any]) -> Callable[..., Any]:
    """``weight(format)``: a module's parameter of ``SHAPE``."""
    kind = submodule("integration.experts.quantized.parameter").QuantizedWeight
    quantize = submodule("ops.quantization.encode").quantize
    read_float4 = submodule("ops.quantization.float4").read_float4

    def make(format: str = "nf4", dtype: torch.dtype = torch.bfloat16) -> Any:
        if format == "nvfp4":
            # Scales of one byte, and one factor for all experts.
            codes = torch.randint(256, (4, 6, 16), dtype=torch.uint8)
            scales = (torch.rand(4, 6, 2) + 0.5).to(torch.float8_e4m3fn)
            stack = read_float4(codes, scales, "w", factor=torch.rand(1), block=16, dtype=dtype)
        else:
            stack = quantize(torch.randn(SHAPE).to(dtype), "nf4" if format == "nested" else format)
        if format == "nested":
            # Scales that are codes themselves, as bitsandbytes' compress_statistics makes them.
            scales = (
                torch.randint(256, stack.scales[0].shape, dtype=torch.uint8),
                torch.linspace(-1, 1, 256),
                torch.rand(1),
                torch.tensor(1.5),
            )
            layout = dataclasses.replace(stack.format, nested=256)
            stack = dataclasses.replace(stack, scales=scales, format=layout).check("w")
        return torch.nn.Parameter(kind(stack), requires_grad=False)

    return make


class Holder(torch.nn.Module):
    def __init__(self, parameter: Any) -> None:
        super().__init__()
        self.weight = parameter


def inner(parameter: Any) -> list[torch.Tensor]:
    codes, scales, _ = parameter.stack.operands()
    return [codes, *scales]


def same(one: Any, other: Any) -> bool:
    """True if both are quantized parameters with the same bits, in storage of their own."""
    assert type(one) is type(other)
    assert isinstance(one, torch.nn.Parameter)
    assert (one.shape, one.dtype, one.requires_grad) == (other.shape, other.dtype, False)
    assert one.stack.format == other.stack.format
    return all(
        a.dtype == b.dtype and a.data_ptr() != b.data_ptr() and torch.equal(a.float(), b.float())
        for a, b in zip(inner(one), inner(other), strict=True)
    )


def saved(module: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return Holder(torch.nn.Parameter(torch.load(file, weights_only=weights_only)["weight"], False))


def loaded(module: Any) -> Any:
    other = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: saved(module, weights_only=True),
        lambda module: saved(module, weights_only=False),
        loaded,
    ],
    ids=["deepcopy", "pickle", "weights_only", "torch.load", "load_state_dict"],
)
def test_a_copy_has_the_same_bits(weight: Any, format: str, way: Callable[[Any], Any]) -> None:
    module = Holder(weight(format))
    assert same(way(module).weight, module.weight)


@pytest.mark.parametrize("format", FORMATS)
def test_moving_and_casting_keep_codes_and_scales(weight: Any, format: str) -> None:
    module = Holder(weight(format))
    before = module.weight.stack
    meta = copy.deepcopy(module).to("meta")
    assert {t.device.type for t in (meta.weight, *inner(meta.weight))} == {"meta"}
    assert isinstance(meta.weight, torch.nn.Parameter)
    assert meta.weight.shape == SHAPE
    cast = module.to(torch.float32).weight
    assert cast.dtype == cast.dequantize().dtype == cast[0].dtype == torch.float32
    assert [t.dtype for t in inner(cast)] == [t.dtype for t in (before.codes, *before.scales)]
    assert torch.equal(cast.dequantize().bfloat16(), copy.deepcopy(cast).to(torch.bfloat16).dequantize())
    with pytest.raises(ValueError, match=r"stands for one of .*, got torch.float64"):
        module.double()


@pytest.mark.parametrize("format", FORMATS)
def test_reading_experts_decodes_those(weight: Any, format: str) -> None:
    parameter = weight(format)
    dense = parameter.dequantize()
    assert type(dense) is torch.Tensor
    assert dense.shape == SHAPE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in (1, -1, torch.tensor(2), torch.tensor([3, 0])):
            assert torch.equal(parameter[index], dense[index])
        assert type(torch.zeros_like(parameter)) is type(parameter.new_empty(3)) is torch.Tensor
    with pytest.raises(IndexError):
        parameter[4]


@pytest.mark.parametrize("format", FORMATS)
def test_parts_along_the_experts_are_quantized(weight: Any, format: str) -> None:
    parameter = weight(format)
    dense = parameter.dequantize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part, exact in zip(parameter.chunk(2), dense.chunk(2), strict=True):
            assert type(part) is type(parameter)
            assert torch.equal(part.dequantize(), exact)
        assert torch.equal(parameter[1:].dequantize(), dense[1:])
        # As FSDP2 pads and fills a part.
        padded = parameter.new_zeros((2, *SHAPE[1:]))
        assert not padded.dequantize().any()
        padded.narrow(0, 0, 1).copy_(parameter.narrow(0, 3, 1))
        assert torch.equal(padded[0], dense[3])
        flat = parameter.view(-1)
        assert flat.shape == (dense.numel(),)
        assert torch.equal(flat.dequantize(), dense.view(-1))
    with pytest.raises(
        NotImplementedError, match="cannot be split in parts of 3 experts: expected a number of proc"
    ):
        parameter.split(3)


def test_blocks_that_run_over_experts_cannot_be_split(submodule: Any) -> None:
    kind = submodule("integration.experts.quantized.parameter").QuantizedWeight
    parameter = kind(submodule("ops.quantization.encode").quantize(torch.randn(4, 5, 22), "nf4"))
    with pytest.raises(
        NotImplementedError, match="after 2 experts: blocks of 64 elements run from one to the next"
    ):
        parameter.chunk(2)


def test_anything_else_decodes_all_with_one_warning_that_names_it(weight: Any) -> None:
    parameter = weight()
    dense = parameter.dequantize()
    with pytest.warns(
        UserWarning, match=r"aten.mul.Tensor on a quantized weight \[4, 6, 32\] decodes all of it"
    ):
        assert torch.equal(parameter * 2, dense * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(parameter * 3, dense * 3)


def test_what_would_write_is_an_error(weight: Any) -> None:
    parameter, other = weight("nf4"), weight("fp8")
    for write in (
        lambda: parameter.add_(1),
        lambda: parameter.data.add_(1),
        lambda: setattr(parameter, "data", parameter.dequantize()),
        lambda: torch.nn.init.normal_(parameter),
        lambda: torch.mul(parameter.dequantize(), 2, out=parameter),
        lambda: torch._foreach_mul_([torch.ones(2), parameter.data], 2.0),
    ):
        with pytest.raises(RuntimeError, match=r"\[4, 6, 32\] cannot be written to; call dequantize_experts"):
            write()
    with pytest.raises(ValueError, match=r"expected one of its format, got a dense torch\.float32"):
        parameter.copy_(torch.randn(SHAPE))
    broken = copy.deepcopy(parameter)
    broken.stack.scales[0][3] = torch.nan
    with pytest.raises(ValueError, match="expected finite scales, got 1 that are NaN or infinite"):
        parameter.copy_(broken)
    with pytest.raises(ValueError, match=r"expected QuantizedWeight\(.*nf4.*got QuantizedWeight\(.*e4m3"):
        parameter.copy_(other)


def test_processes_share_codes_and_scales(weight: Any) -> None:
    module = Holder(weight())
    module.share_memory()
    assert module.weight.is_shared()
    assert all(part.is_shared() for part in inner(module.weight))
    received = pickle.loads(ForkingPickler.dumps(module.weight))
    assert isinstance(received, torch.nn.Parameter)
    received.stack.scales[0][0] = 7
    assert module.weight.stack.scales[0][0] == 7


def test_no_array_is_made_of_it(weight: Any) -> None:
    with pytest.raises(
        TypeError, match=r"no array of numbers: call dequantize\(\) .* cannot be offloaded to disk"
    ):
        weight().numpy()
    with pytest.raises(ValueError, match="expected codes and scales, got Tensor"):
        type(weight())(torch.randn(SHAPE), requires_grad=False)


def test_data_can_be_replaced_by_another_quantized_weights(weight: Any) -> None:
    for format in ("nf4", "fp8"):
        parameter, other = weight("nf4"), weight(format).to(torch.float32)
        parameter.data = other.data
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.dequantize(), other.dequantize())
        assert type(parameter.data) is type(parameter)


def test_it_cannot_be_trained(weight: Any) -> None:
    parameter = weight()
    kind = type(parameter)
    for ask in (
        lambda: parameter.requires_grad_(),
        lambda: setattr(parameter, "requires_grad", True),
        lambda: torch.nn.Parameter(kind(parameter.stack)),
        lambda: Holder(parameter).requires_grad_(),
    ):
        with pytest.raises(ValueError, match="cannot be trained: leave requires_grad False"):
            ask()
    Holder(parameter).requires_grad_(False)
    assert not parameter.requires_grad


@pytest.mark.parametrize("format", FORMATS)
def test_compiled_without_a_break(weight: Any, format: str) -> None:
    module = Holder(weight(format))

    def forward(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales, _ = module.weight.stack.operands()
        return x @ module.weight[1].float().mT, codes.sum() + scales[0].float().sum()

    x = torch.randn(3, SHAPE[2])
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(module, x), forward(module, x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("experts", [None, [2, 0]])
def test_decoding_passes_opcheck(weight: Any, submodule: Any, experts: list[int] | None) -> None:
    operator = submodule("ops.quantization.op").decode_experts
    # Of NVFP4's scales opcheck itself would take the mean, which torch does not compute in float8.
    for format in set(FORMATS) - {"nvfp4"}:
        stack = weight(format).stack
        for oriented in (stack, stack.mT):
            torch.library.opcheck(operator, (*oriented.operands(), torch.float32, experts))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(weight: Any, use_reentrant: bool) -> None:
    module = Holder(weight("fp8", torch.float32))
    x = torch.randn(3, SHAPE[2], requires_grad=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return (x @ module.weight[1].mT).sin()

    (exact,) = torch.autograd.grad(forward(x).sum(), x)
    torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, exact)
