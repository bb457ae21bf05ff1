"""Fixtures of the tests of quantized stacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import same_bits


@pytest.fixture
def quantization(submodule):
    """``quantization("float8")``: a module of ``ops/quantization``."""
    return lambda name: submodule(f"ops.quantization.{name}")


@pytest.fixture
def decoded(quantization, monkeypatch):
    """``decoded(stack)``: all matrices as the oracle decodes them, after the fast ways gave the same bits."""

    def decode(stack: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        stack = quantization("stack").QuantizedStack.from_operands(*stack.operands(), stack.dtype)
        exact = quantization("reference").decode(stack, dtype)
        for installed in {False, quantization("cpu").has_bitsandbytes()}:
            with monkeypatch.context() as patch:
                patch.setattr(quantization("cpu"), "has_bitsandbytes", lambda i=installed: i)
                assert same_bits(quantization("decode").decode(stack, slice(None), dtype=dtype), exact)
        chosen = list(range(stack.shape[0]))[::-2]
        out = exact.new_empty((len(chosen), *stack.stored_shape[1:]))
        assert same_bits(quantization("decode").decode(stack, chosen, out=out), exact[chosen])
        return exact

    return decode
