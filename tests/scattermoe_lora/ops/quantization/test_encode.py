"""Quantizing: the bits of bitsandbytes, float8 to within half a step, and no second dense stack."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def encode(submodule: Any) -> ModuleType:
    return submodule("ops.quantization.encode")


@pytest.mark.parametrize("shape", [(2, 256, 128), (3, 5, 22), (2, 130, 300)])
def test_float8_is_the_nearest_number_on_the_scale_of_its_block(
    encode: ModuleType, submodule: Any, shape: tuple[int, int, int]
) -> None:
    weight = torch.randn(shape) * torch.logspace(-6, 0, shape[1])[:, None]
    weight[0, 0, 0] = 0
    stack = encode.quantize(weight, "fp8").check("weight")
    decoded = submodule("ops.quantization.reference").decode(stack)
    scale = stack.scales[0].repeat_interleave(128, 1)[:, : shape[1]]
    scale = scale.repeat_interleave(128, 2)[:, :, : shape[2]]
    # Half a unit in the last of three digits, and of the smallest number, 2^-9.
    assert bool(((decoded - weight).abs() <= weight.abs() * 2**-4 + scale * 2**-10).all())
    assert float((decoded / scale).abs().max()) == pytest.approx(448)


@pytest.mark.parametrize("format", ["nf4", "fp4", "fp8"])
def test_zeros_and_transposed_stacks(encode: ModuleType, submodule: Any, format: str) -> None:
    decode = submodule("ops.quantization.reference").decode
    assert not decode(encode.quantize(torch.zeros(2, 4, 6), format)).any()
    weight = torch.randn(3, 8, 10)
    assert torch.equal(decode(encode.quantize(weight.mT, format)), decode(encode.quantize(weight, format)).mT)


@pytest.mark.parametrize("format", ["nf4", "fp8"])
def test_a_meta_stack_gets_the_shapes_of_its_parts_at_once(encode: ModuleType, format: str) -> None:
    weight = torch.randn(3, 130, 70)
    real, meta = encode.quantize(weight, format), encode.quantize(weight.to("meta"), format)
    assert [(t.shape, t.dtype) for t in (meta.codes, *meta.scales)] == [
        (t.shape, t.dtype) for t in (real.codes, *real.scales)
    ]
    start = time.process_time()
    encode.quantize(torch.empty(1 << 12, 1 << 12, 1 << 10, device="meta"), format)
    assert time.process_time() - start < 5  # A walk over its chunks takes minutes.


@pytest.mark.parametrize(
    ("weight", "format", "message"),
    [
        (torch.randn(2, 4, 6), "nf5", "expected a format among nf4, fp4, fp8, got 'nf5'"),
        (torch.randn(4, 6), "nf4", r"w: expected \[E, N, K\], got \[4, 6\]"),
        (torch.randn(2, 4, 6).double(), "fp8", "w: expected one of .*, got torch.float64"),
        (torch.randn(2, 4, 7), "fp4", "expected an even number of columns for fp4, got 7"),
        (torch.full((2, 4, 6), torch.nan), "nf4", "expected finite weights"),
        (torch.full((2, 4, 6), torch.inf), "fp8", "expected finite weights"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    encode: ModuleType, weight: torch.Tensor, format: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode.quantize(weight, format, "w")


class Allocations(TorchDispatchMode):
    """Notes the largest storage that an operator makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before, after = (
            {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in torch.utils._pytree.tree_leaves(tree)
                if isinstance(t, torch.Tensor)
            }
            for tree in ((args, kwargs), result)
        )
        self.largest = max([self.largest, *(after[new] for new in after.keys() - before.keys())])
        return result


@pytest.mark.parametrize("format", ["nf4", "fp8"])
def test_nothing_larger_than_the_codes_is_allocated(
    encode: ModuleType, format: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(encode, "_CHUNK_ELEMENTS", 1024)
    weight = torch.randn(16, 256, 64, dtype=torch.bfloat16)
    with Allocations() as allocations:
        stack = encode.quantize(weight, format)
    assert allocations.largest == stack.codes.nbytes
    # float32 for 64 elements; and for a block that could have 128 columns.
    assert stack.nbytes / weight.nbytes == (0.28125 if format == "nf4" else 0.5 + 2 / 8192)
