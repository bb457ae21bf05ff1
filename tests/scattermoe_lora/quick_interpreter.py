"""Triton's interpreter without the work that it repeats for every operation of every program in a grid.

By itself it searches all of ``triton.language`` for what to replace at every launch and at every call of a device
function, makes a table of dtypes whenever it asks for one, wraps, checks, names and compares the same few shapes and
dtypes for every tensor, and computes sums and products of 32-bit integers a second time in 64 bits. The results are
the same. An offset that 32 bits do not hold is found by the tests of tensors with more than 2^31 elements.
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
broadcast, operands = TritonSemantic.broadcast_impl_value, TritonSemantic.binary_op_type_checking_impl
# Two operands of one of these are computed with as they are, by every operator.
UNCONVERTED = {"int32", "int64", "fp32"}


def call(function: interpreter.InterpretedFunction, *arguments: Any, **options: Any) -> Any:
    """Call a device function where the language has been prepared."""
    return function.rewrite()(*arguments, **options)


# By the identity of a block type's shape, which ``checked`` keeps: that of tensors, and their number of elements.
wrapped: dict[int, tuple[tl.tuple, tl.constexpr]] = {}
SCALAR = tl.tuple([]), tl.constexpr(1)


@functools.cache
def checked(sizes: tuple[int, ...]) -> tuple[tl.tuple, int]:
    """The shape of a block type, one object for equal ones, and its number of elements."""
    block = tl.block_type.__new__(tl.block_type)
    make_block_type(block, tl.int32, list(sizes))
    wrapped[id(block.shape)] = tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(block.numel)
    return block.shape, block.numel


@functools.cache
def named(sizes: tuple[int, ...], element: str) -> str:
    return f"<{checked(sizes)[0]}, {element}>"


def init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Iterable[Any]) -> None:
    self.element_ty = element_ty
    sizes = tuple([getattr(size, "value", size) for size in getattr(shape, "values", shape)])
    self.shape, self.numel = checked(sizes)
    self.name = named(sizes, element_ty.name)


def init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    self.handle, self.type = handle, type
    if isinstance(type, tl.block_type):
        self.dtype, (self.shape, self.numel) = type.element_ty, wrapped[id(type.shape)]
    else:
        self.dtype, (self.shape, self.numel) = type, SCALAR


def broadcast_unless_equal(
    self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)


def operands_unless_equal(
    self: TritonSemantic, lhs: Any, rhs: Any, *options: Any, **named_options: Any
) -> tuple[tl.tensor, tl.tensor]:
    if (
        isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor) and lhs.shape is rhs.shape
        and lhs.dtype.name in UNCONVERTED and lhs.dtype.name == rhs.dtype.name
    ):  # fmt: skip
        return lhs, rhs
    return operands(self, lhs, rhs, *options, **named_options)


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
    TritonSemantic.binary_op_type_checking_impl = operands_unless_equal
    TritonSemantic.computation_type_impl = functools.cache(TritonSemantic.computation_type_impl)
    interpreter._get_np_dtype = cached_numpy_dtype
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
