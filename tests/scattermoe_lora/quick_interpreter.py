"""Triton's interpreter without the work that it repeats for every operation of every program in a grid.

By itself it searches all of ``triton.language`` for what to replace at every launch and at every call of a device
function, makes a table of dtypes whenever it asks for one, wraps, checks and compares the same few shapes for every
tensor, and computes sums and products of 32-bit integers a second time in 64 bits. The results are the same. An offset
that 32 bits do not hold is found by the tests of tensors with more than 2^31 elements.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

# The two names under which kernels, and the device functions of Triton itself, know the language.
LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
make_block_type, numpy_dtype = tl.block_type.__init__, interpreter._get_np_dtype
broadcast = TritonSemantic.broadcast_impl_value


def call(function: interpreter.InterpretedFunction, *arguments: Any, **options: Any) -> Any:
    """Call a device function where the language has been prepared."""
    return function.rewrite()(*arguments, **options)


@functools.cache
def checked(sizes: tuple[int, ...]) -> tuple[tl.tuple, int]:
    """The shape of a block type, one object for equal ones, and its number of elements."""
    block = tl.block_type.__new__(tl.block_type)
    make_block_type(block, tl.int32, list(sizes))
    return block.shape, block.numel


def init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Iterable[Any]) -> None:
    self.element_ty = element_ty
    self.shape, self.numel = checked(tuple(getattr(size, "value", size) for size in shape))
    self.name = f"<{self.shape}, {element_ty}>"


@functools.cache
def wrapped(sizes: tuple[int, ...]) -> tl.tuple:
    """The shape of a tensor, one object for equal ones."""
    return tl.tuple([tl.constexpr(size) for size in sizes])


def init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape = wrapped(tuple(type.shape) if type.is_block() else ())
    self.numel = tl.constexpr(type.numel if type.is_block() else 1)


def broadcast_unless_equal(
    self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)


numpy_dtypes: dict[str, Any] = {}


def cached_numpy_dtype(dtype: tl.dtype) -> Any:
    # Of a block type, that of its elements.
    name = dtype.scalar.name
    if name not in numpy_dtypes:
        numpy_dtypes[name] = numpy_dtype(dtype)
    return numpy_dtypes[name]


def install() -> None:
    """Make it so for this process, which can compile no kernels then."""
    interpreter._patch_lang(LANGUAGE)
    prepared = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda kernel: prepared
    interpreter.InterpretedFunction.__call__ = call
    tl.block_type.__init__, tl.tensor.__init__ = init_block_type, init_tensor
    TritonSemantic.broadcast_impl_value = broadcast_unless_equal
    interpreter._get_np_dtype = cached_numpy_dtype
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
