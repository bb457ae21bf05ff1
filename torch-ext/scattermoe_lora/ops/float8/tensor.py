"""A matrix, or a stack of matrices, whose numbers are kept in float8, as a tensor of the dense one's shape and dtype.

It can be written to, an update at a time, and read, a matrix at a time. Codes and scales are all that is kept; they
move, copy and save with it. Operators that are not listed here compute with a dense copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_map_only

from .. import subclass
from . import rounding
from .rounding import BLOCK, Float8, blocks_of

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that a float8 tensor stands for."""


class Float8Tensor(torch.Tensor):
    """Matrices in float8 with the shape and dtype of the dense ones.

    Attributes:
        codes: uint8 ``[P, N, K]``; blocks begin anew with each of the P matrices.
        scales: float32 ``[P, ceil(N / 128), ceil(K / 128)]``.
        layout_dims: 3 for the shape ``[P, N, K]``, 2 for ``[P * N, K]``, 1 for all elements in a row.
        is_gathered: True in what FSDP2 gathers for a layer's computation, whose gradients it wants dense.
    """

    kind: ClassVar[Float8]
    codes: torch.Tensor
    scales: torch.Tensor
    layout_dims: int
    is_gathered: bool

    @staticmethod
    def __new__(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        dtype: torch.dtype,
        layout_dims: int,
        is_gathered: bool = False,
    ) -> Float8Tensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, _shape(codes.shape, layout_dims), dtype=dtype, device=codes.device, requires_grad=False
        )

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        dtype: torch.dtype,
        layout_dims: int,
        is_gathered: bool = False,
    ) -> None:
        self.codes, self.scales = codes, scales
        self.layout_dims, self.is_gathered = layout_dims, is_gathered

    @classmethod
    def zeros(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
        """A tensor of zeros, ``[N, K]`` or ``[E, N, K]``."""
        count, n, k = shape if len(shape) == 3 else (1, *shape)
        codes = torch.zeros((count, n, k), dtype=torch.uint8, device=device)
        scales = torch.ones((count, blocks_of(n), blocks_of(k)), dtype=torch.float32, device=device)
        return cls(codes, scales, dtype, len(shape))

    @classmethod
    def from_dense(cls, dense: torch.Tensor, *, stochastic: bool) -> Any:
        """The tensor of a dense ``[N, K]`` or ``[E, N, K]``, rounded."""
        result = cls.zeros(dense.shape, dense.dtype, dense.device)
        if not dense.is_meta:
            for matrix, numbers in enumerate(dense.detach().view(result.codes.shape)):
                result.write(matrix, numbers, stochastic=stochastic)
        return result

    def read(self, matrix: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``[N, K]``, a dense copy of one matrix."""
        return rounding.decode(self.codes[matrix], self.scales[matrix], self.kind, dtype)

    def write(
        self,
        matrix: int,
        numbers: torch.Tensor,
        *,
        stochastic: bool,
        generator: torch.Generator | None = None,
    ) -> None:
        """Rounds ``[N, K]`` into one matrix."""
        codes, scales = self.codes[matrix], self.scales[matrix]
        rounding.encode(numbers, self.kind, codes, scales, stochastic=stochastic, generator=generator)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A dense copy of all of it."""
        dtype = dtype or self.dtype
        if self.codes.is_meta:
            return torch.empty(self.shape, dtype=dtype, device="meta")
        if len(self.codes) == 1:
            return self.read(0, dtype).view(self.shape)
        dense = torch.empty(self.codes.shape, dtype=dtype, device=self.device)
        for matrix in range(len(self.codes)):
            dense[matrix] = self.read(matrix)
        return dense.view(self.shape)

    def map_tensors(
        self, function: Callable[[torch.Tensor], torch.Tensor], layout_dims: int | None = None
    ) -> Any:
        """The tensor of what a function makes of codes and scales."""
        codes, scales = function(self.codes), function(self.scales)
        return type(self)(codes, scales, self.dtype, layout_dims or self.layout_dims, self.is_gathered)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["codes", "scales"], (self.dtype, self.layout_dims, self.is_gathered)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, torch.Tensor], context: tuple[Any, ...], size: Any, stride: Any
    ) -> Any:
        return cls(inner["codes"], inner["scales"], *context)

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        _, context = self.__tensor_flatten__()
        parameter = self.requires_grad if isinstance(self, torch.nn.Parameter) else None
        return _rebuild, (type(self), self.codes, self.scales, context, parameter)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func) or subclass.handler(func)
        result = NotImplemented if handler is None else handler(func, *args, **(kwargs or {}))
        return _on_dense(func, args, kwargs or {}) if result is NotImplemented else result


def _shape(codes: Sequence[int], layout_dims: int) -> list[int]:
    count, n, k = codes
    return {3: [count, n, k], 2: [count * n, k], 1: [count * n * k]}[layout_dims]


def _rebuild(
    kind: type[Float8Tensor],
    codes: torch.Tensor,
    scales: torch.Tensor,
    context: tuple[Any, ...],
    requires_grad: bool | None,
) -> torch.Tensor:
    tensor = kind(codes, scales, *context)
    return tensor if requires_grad is None else torch.nn.Parameter(tensor, requires_grad)


def _on_dense(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result for dense copies; what the operator wrote to one is rounded to the nearest and kept."""
    written: list[tuple[Float8Tensor, torch.Tensor]] = []

    def dense(tensor: Float8Tensor) -> torch.Tensor:
        copy = tensor.dequantize()
        written.append((tensor, copy))
        return copy

    result = func(*tree_map_only(Float8Tensor, dense, args), **tree_map_only(Float8Tensor, dense, kwargs))
    if not func._schema.is_mutable:
        return result
    originals = {id(copy): tensor for tensor, copy in written}
    for tensor, copy in written:
        for matrix, numbers in enumerate(copy.view(tensor.codes.shape)):
            tensor.write(matrix, numbers, stochastic=False)
    return tree_map_only(torch.Tensor, lambda tensor: originals.get(id(tensor), tensor), result)


def _to_copy(func: Any, tensor: Any, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    kwargs.pop("memory_format", None)
    if dtype not in (None, tensor.dtype):
        dense = tensor.dequantize(dtype)
        return dense.to(kwargs["device"]) if kwargs.get("device") else dense
    return tensor.map_tensors(lambda part: func(part, **kwargs))


def _like(func: Any, tensor: Any, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    kwargs.pop("memory_format", None)
    if dtype not in (None, tensor.dtype):
        return NotImplemented
    return tensor.map_tensors(lambda part: func(part, **kwargs))


def _copy(func: Any, target: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, Float8Tensor):
        return target.copy_(source.dequantize())
    is_alike = isinstance(source, Float8Tensor) and source.kind is target.kind
    if is_alike and source.codes.shape == target.codes.shape:
        target.codes.copy_(source.codes, non_blocking)
        target.scales.copy_(source.scales, non_blocking)
        return target
    if source.shape != target.shape:
        raise ValueError(f"float8: copy_: expected {list(target.shape)}, got {list(source.shape)}")
    if isinstance(source, Float8Tensor):
        source = source.dequantize()
    for matrix, numbers in enumerate(source.to(target.device).reshape(target.codes.shape)):
        target.write(matrix, numbers, stochastic=False)
    return target


def _zero(func: Any, tensor: Any) -> Any:
    tensor.codes.zero_()
    tensor.scales.fill_(1)  # One that was NaN, as well.
    return tensor


def _scale_by(func: Any, tensor: Any, factor: Any) -> Any:
    """A number multiplies the scales, and rounds nothing."""
    if not isinstance(tensor, Float8Tensor) or (isinstance(factor, torch.Tensor) and factor.dim()):
        return NotImplemented
    func(tensor.scales, factor)
    return tensor


def _scale_all(func: Any, tensors: Any, factor: Any) -> None:
    factors = factor if isinstance(factor, (list, tuple)) else [factor] * len(tensors)
    for tensor, number in zip(tensors, factors, strict=True):
        tensor.mul_(number)


def _add(func: Any, tensor: Any, other: Any, *, alpha: float = 1) -> Any:
    """Decompressed, added to and compressed with stochastic rounding, a matrix at a time."""
    if not isinstance(tensor, Float8Tensor) or not isinstance(other, torch.Tensor):
        return NotImplemented
    if func is aten.add.Tensor:
        tensor = tensor.clone()
    if isinstance(other, Float8Tensor) and other.codes.shape != tensor.codes.shape:
        return NotImplemented
    dense = (
        None if isinstance(other, Float8Tensor) else other.expand(tensor.shape).reshape(tensor.codes.shape)
    )
    for matrix in range(len(tensor.codes)):
        term: torch.Tensor = other.read(matrix) if dense is None else dense[matrix]  # type: ignore[attr-defined]
        tensor.write(matrix, tensor.read(matrix).add_(term, alpha=alpha), stochastic=True)
    return tensor


def _add_all(func: Any, tensors: Any, others: Any, *, alpha: float = 1) -> None:
    for tensor, other in zip(tensors, others, strict=True):
        tensor.add_(other, alpha=alpha)


def _norm(
    func: Any, tensor: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if dim is not None or keepdim:
        return NotImplemented
    norms = [func(tensor.read(matrix), ord) for matrix in range(len(tensor.codes))]
    return func(torch.stack(norms), ord).to(dtype or tensor.dtype)


def _norms(func: Any, tensors: Sequence[Any], ord: float = 2, dtype: Any = None) -> list[torch.Tensor]:
    return [torch.linalg.vector_norm(tensor, ord, dtype=dtype) for tensor in tensors]


def _select(func: Any, tensor: Any, dim: int, index: int) -> Any:
    if dim not in (0, -3) or tensor.dim() != 3:
        return NotImplemented
    count = len(tensor.codes)
    if not -count <= index < count:
        raise IndexError(f"index {index} is out of bounds for dimension 0 with size {count}")
    return tensor.read(index % count, tensor.dtype)


def _view(func: Any, tensor: Any, size: Sequence[int]) -> Any:
    if list(size) in ([-1], [tensor.numel()]):
        return tensor.map_tensors(lambda part: part, 1)
    return tensor.map_tensors(lambda part: part) if list(size) == list(tensor.shape) else NotImplemented


def _slice(
    func: Any, tensor: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    if step != 1 or (first, last) != (0, tensor.shape[dim]):
        return NotImplemented
    return tensor.map_tensors(lambda part: part)


def _split(func: Any, tensor: Any, size: int, dim: int = 0) -> Any:
    """Parts along the first dimension, as processes hold them: of the same storage, or with blocks of their own."""
    if dim not in (0, -tensor.dim()) or tensor.dim() == 1:
        return NotImplemented
    length = tensor.shape[0]
    if length % size:
        raise NotImplementedError(
            f"float8: {list(tensor.shape)} cannot be split in parts of {size}: expected a number of processes that "
            f"divides {length}"
        )
    return [_part(tensor, start, start + size) for start in range(0, length, size)]


def _part(tensor: Any, start: int, end: int) -> Any:
    if tensor.dim() == 3:
        return tensor.map_tensors(lambda part: part[start:end])
    rows, scales = tensor.codes[0, start:end], tensor.scales[0]
    if start % BLOCK == 0:
        within = scales[start // BLOCK : blocks_of(end)]
        return type(tensor)(rows.unsqueeze(0), within.unsqueeze(0), tensor.dtype, 2)
    return type(tensor).from_dense(tensor.dequantize()[start:end], stochastic=False)


def _new_zeros(func: Any, tensor: Any, size: Sequence[int], **kwargs: Any) -> Any:
    if tensor.dim() == 1 or len(size) != tensor.dim() or list(size[1:]) != list(tensor.shape[1:]):
        return subclass.without_numbers(func, tensor, size, **kwargs)
    return type(tensor).zeros(size, tensor.dtype, kwargs.get("device") or tensor.device)


def _refuse_step(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Raises NotImplementedError: written back to the nearest, most updates would be none."""
    raise NotImplementedError(
        f"float8: {func} writes to weights in float8, whose steps are wider than most updates: expected an optimizer "
        "that rounds stochastically; take Adafactor of this package, or Float8Optimizer around another"
    )


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _like,
    aten.zeros_like.default: _like,
    aten.copy_.default: _copy,
    aten.zero_.default: _zero,
    aten.mul_.Tensor: _scale_by,
    aten.mul_.Scalar: _scale_by,
    aten.div_.Tensor: _scale_by,
    aten.div_.Scalar: _scale_by,
    aten._foreach_mul_.Tensor: _scale_all,
    aten._foreach_mul_.Scalar: _scale_all,
    aten._foreach_norm.Scalar: _norms,
    aten._foreach_add_.List: _add_all,
    aten.add_.Tensor: _add,
    aten.add.Tensor: _add,
    aten.linalg_vector_norm.default: _norm,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.view.default: _view,
    aten.new_zeros.default: _new_zeros,
    **dict.fromkeys(  # Those of torch's optimizers.
        (
            aten.lerp_.Scalar,
            aten.addcdiv_.default,
            aten.addcmul_.default,
            aten._fused_adam_.default,
            aten._fused_adam_.tensor_lr,
            aten._fused_adamw_.default,
            aten._fused_adamw_.tensor_lr,
            aten._fused_sgd_.default,
            aten._fused_sgd_.tensor_lr,
            aten._fused_adagrad_.default,
            aten._foreach_lerp_.Scalar,
            aten._foreach_lerp_.ScalarList,
            aten._foreach_addcdiv_.Scalar,
            aten._foreach_addcdiv_.ScalarList,
            aten._foreach_addcdiv_.Tensor,
            aten._foreach_addcmul_.Scalar,
            aten._foreach_addcmul_.ScalarList,
            aten._foreach_addcmul_.Tensor,
        ),
        _refuse_step,
    ),
}
