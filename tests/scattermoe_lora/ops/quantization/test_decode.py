"""Decoding gives the bits of the oracle. Runs natively, in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from bits import DTYPES, every_code, same_bits
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("bfloat16")


@given(
    experts=st.integers(1, 4),
    n=st.integers(1, 40),
    half=st.integers(1, 40),
    rows=st.integers(1, 50),
    columns=st.integers(1, 90),
    element=st.sampled_from(["e4m3", "e2m1"]),
    scale=st.sampled_from([torch.float32, torch.float16, torch.float8_e8m0fnu, torch.float8_e4m3fn]),
    dtype=st.sampled_from(DTYPES),
    factor=st.booleans(),
)
def test_any_shape_of_blocks_decodes_to_the_bits_of_the_reference(
    submodule, experts, n, half, rows, columns, element, scale, dtype, factor
) -> None:
    formats, stacks = submodule("ops.quantization.formats"), submodule("ops.quantization.stack")
    layout = formats.Format(element, rows, columns)
    codes = every_code(experts, n, half * 2 // layout.codes_per_byte)
    scales = [(torch.randn(experts, -(-n // rows), -(-half * 2 // columns)).exp()).to(scale)]
    if factor:
        scales.append(torch.rand(experts))
    stack = stacks.QuantizedStack(codes, tuple(scales), layout, dtype).check("w")
    exact = submodule("ops.quantization.reference").decode(stack)
    assert same_bits(submodule("ops.quantization.decode").decode(stack, slice(None)), exact)


@given(
    experts=st.integers(1, 4),
    n=st.integers(1, 20),
    half=st.integers(1, 40),
    block=st.sampled_from([32, 64, 256, 2048]),
    element=st.sampled_from(["nf4", "fp4"]),
    nested=st.sampled_from([0, 1, 4, 256]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_in_flat_blocks_decodes_to_the_bits_of_the_reference(
    submodule, experts, n, half, block, element, nested, dtype
) -> None:
    formats, stacks = submodule("ops.quantization.formats"), submodule("ops.quantization.stack")
    blocks = -(-experts * n * half * 2 // block)
    scales = [torch.rand(blocks)]
    if nested:
        codes = torch.randint(256, (blocks,), dtype=torch.uint8)
        scales = [codes, torch.randn(256), torch.rand(-(-blocks // nested)), torch.rand(())]
    layout = formats.Format(element, 0, block, nested)
    stack = stacks.QuantizedStack(every_code(experts, n, half), tuple(scales), layout, dtype).check("w")
    exact = submodule("ops.quantization.reference").decode(stack)
    assert same_bits(submodule("ops.quantization.decode").decode(stack, slice(None)), exact)


def test_chosen_experts_in_any_order_decode_to_the_bits_of_the_reference(submodule) -> None:
    formats, stacks = submodule("ops.quantization.formats"), submodule("ops.quantization.stack")
    layout = formats.Format("e2m1", 1, 32)
    stack = stacks.QuantizedStack(every_code(5, 48, 80), (torch.rand(5, 48, 5),), layout, torch.float32)
    exact = submodule("ops.quantization.reference").decode(stack)
    decode = submodule("ops.quantization.decode").decode
    out = torch.empty(3, 48, 160)
    assert decode(stack, [4, 0, 4], out=out) is out
    assert same_bits(out, exact[[4, 0, 4]])
    assert same_bits(decode(stack.mT, slice(1, 3)).contiguous(), exact[1:3].mT.contiguous())
    assert decode(stack, []).shape == (0, 48, 160)
    assert decode(stack, [1], dtype=torch.float16).dtype == torch.float16
