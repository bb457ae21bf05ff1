"""bfloat16 in Triton's interpreter as a GPU computes it.

The interpreter keeps bfloat16 as 16 bits. It multiplies these as integers, and cuts off the digits of a float32 that
becomes one. Here, while a test runs, products are those of the values, summed in float32, and conversions round.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(floats: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, as torch rounds."""
    tensor = torch.from_numpy(np.array(floats, dtype=np.float32, order="C"))
    return tensor.bfloat16().view(torch.int16).numpy().view(np.uint16)


def install(patch: pytest.MonkeyPatch, dispatch: ModuleType) -> None:
    """Into the interpreter, and into the kernel's module that otherwise refuses bfloat16 there."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        types = source.dtype.scalar, target.scalar
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded(source.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(values(source.data), tl.float32)
        return cast(self, source, target)

    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, sums: TensorHandle, *rest: Any
    ) -> TensorHandle:
        if a.dtype.scalar == tl.bfloat16:
            return TensorHandle(values(a.data) @ values(b.data) + sums.data, sums.dtype.scalar)
        return dot(self, a, b, sums, *rest)

    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(dispatch, "use_triton", lambda x: True)
