"""A quantized stack of matrices as a tensor, so that it can be a module's parameter.

Models, optimizers, PEFT, checkpoints and the compiler take it for the dense weight that it stands for: it has that
weight's shape, dtype and device. It keeps codes and scales only, which move, copy and save with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from ....ops.quantization.op import decode_experts
from ....ops.quantization.stack import FLOATS, QuantizedStack
from . import parts

aten = torch.ops.aten


class QuantizedWeight(torch.Tensor):
    """A stack of quantized matrices with the shape, dtype and device of the dense one: frozen, read by kernels.

    ``torch.nn.Parameter(QuantizedWeight(stack), requires_grad=False)`` is a module's parameter. It can be moved,
    copied, saved, loaded (``copy_`` from another of its format) and given another dtype, which changes what it decodes
    to and nothing that is kept. ``weight[e]`` decodes one matrix. Whatever else reads its numbers gets a dense copy of
    all of them, with a warning; whatever writes to it is an error.

    FSDP2 splits it along the experts, gathers codes and scales, and so needs no more memory or traffic than these.

    Args:
        stack: Codes, scales and format.
        is_flat: Gives it one dimension, as FSDP2 looks at a parameter.
    """

    codes: torch.Tensor
    _layout: str
    _scale_dtypes: tuple[torch.dtype, ...]
    _is_flat: bool

    @staticmethod
    def __new__(cls, stack: QuantizedStack, is_flat: bool = False) -> QuantizedWeight:
        shape = [stack.shape.numel()] if is_flat else stack.shape
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=stack.dtype, device=stack.device, requires_grad=False
        )

    def __init__(self, stack: QuantizedStack, is_flat: bool = False) -> None:
        self.codes = stack.codes
        self._is_flat = is_flat
        self._layout = str(stack.format)
        self._scale_dtypes = tuple(scale.dtype for scale in stack.scales)
        for name, scale in zip(self._scale_names(), stack.scales, strict=True):
            # Bytes, for torch pickles no float8 and knows few operators on it.
            setattr(self, name, scale.view(torch.uint8) if scale.itemsize == 1 else scale)

    def _scale_names(self) -> list[str]:
        return [f"scale{i}" for i in range(len(self._scale_dtypes))]

    @property
    def stack(self) -> QuantizedStack:
        """Codes, scales and format, of this tensor's own storage."""
        scales = [getattr(self, name) for name in self._scale_names()]
        typed = [
            scale if scale.dtype == dtype else scale.view(dtype)
            for scale, dtype in zip(scales, self._scale_dtypes, strict=True)
        ]
        return QuantizedStack.from_operands(self.codes, typed, self._layout, self.dtype)

    def dequantize(self) -> torch.Tensor:
        """The dense ``[E, N, K]`` in this tensor's dtype."""
        return self._decoded().reshape(self.shape) if self._is_flat else self._decoded()

    def _decoded(self, experts: Sequence[int] | None = None) -> torch.Tensor:
        codes, scales, layout = self.stack.operands()
        return decode_experts(codes, scales, layout, self.dtype, experts)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedWeight:
        """Itself; ValueError where a gradient is asked for."""
        _refuse_gradient(requires_grad)
        return self

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["codes", *self._scale_names()], (
            self._layout,
            self.dtype,
            self._scale_dtypes,
            self._is_flat,
        )

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], context: tuple[Any, ...], size: Any, stride: Any
    ) -> QuantizedWeight:
        layout, dtype, scale_dtypes, is_flat = context
        scales = [inner[f"scale{i}"].view(scale_dtype) for i, scale_dtype in enumerate(scale_dtypes)]
        return QuantizedWeight(QuantizedStack.from_operands(inner["codes"], scales, layout, dtype), is_flat)

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        names, context = self.__tensor_flatten__()
        inner = {name: getattr(self, name) for name in names}
        return _rebuild, (inner, context, isinstance(self, torch.nn.Parameter))

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Codes and scales to gather along their first dimension, and what they mean."""
        names, context = self.__tensor_flatten__()
        return tuple(getattr(self, name).contiguous() for name in names), context

    def fsdp_post_all_gather(
        self,
        outputs: tuple[torch.Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: QuantizedWeight | None = None,
    ) -> tuple[QuantizedWeight, tuple[torch.Tensor, ...]] | None:
        """The whole weight of what was gathered; ``out`` has been made of the same memory."""
        if out is not None:
            return None
        layout, _, *others = metadata
        inner = dict(zip(self.__tensor_flatten__()[0], outputs, strict=True))
        weight = QuantizedWeight.__tensor_unflatten__(inner, (layout, param_dtype, *others), None, None)
        return weight, outputs

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({list(self.shape)}, {self.dtype}, {self._layout}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        handler = _HANDLERS.get(func) or _COLLECTIVES.get(func._schema.name)
        result = NotImplemented if handler is None else handler(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
        return _on_dense(func, args, kwargs)


def _refuse_gradient(requires_grad: bool) -> None:
    if requires_grad:
        raise ValueError(
            "scattermoe: a quantized weight cannot be trained: leave requires_grad False and train LoRA on it "
            "(PEFT's target_parameters), or call dequantize_experts(model) first"
        )


# Set here, for a property in the class's body would hide what the type checker knows of torch's.
QuantizedWeight.requires_grad = property(  # type: ignore[assignment]
    lambda self: False, lambda self, requires_grad: _refuse_gradient(requires_grad)
)


def _rebuild(inner: Mapping[str, torch.Tensor], context: tuple[Any, ...], is_parameter: bool) -> torch.Tensor:
    weight = QuantizedWeight.__tensor_unflatten__(inner, context, None, None)
    return torch.nn.Parameter(weight, requires_grad=False) if is_parameter else weight


# What torch.load and its weights_only=True may call.
torch.serialization.add_safe_globals([_rebuild])


def _with_parts(weight: QuantizedWeight, function: Any, dtype: torch.dtype | None = None) -> QuantizedWeight:
    names, (layout, old, *others) = weight.__tensor_flatten__()
    inner = {name: function(getattr(weight, name)) for name in names}
    return QuantizedWeight.__tensor_unflatten__(inner, (layout, dtype or old, *others), None, None)


def _same_on_parts(func: Any, weight: Any, **kwargs: Any) -> Any:
    kwargs.pop("memory_format", None)
    result = _with_parts(weight, lambda tensor: func(tensor, **kwargs))
    return return_and_correct_aliasing(func, (weight,), kwargs, result)


def _to_copy(func: Any, weight: QuantizedWeight, **kwargs: Any) -> QuantizedWeight:
    dtype = kwargs.pop("dtype", None)
    kwargs.pop("memory_format", None)
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(
            f"scattermoe: a quantized weight stands for one of {', '.join(map(str, FLOATS))}, got {dtype}"
        )
    return _with_parts(weight, lambda tensor: func(tensor, **kwargs), dtype)


def _empty_like(func: Any, weight: QuantizedWeight, **kwargs: Any) -> QuantizedWeight:
    """Of the same format: ``Module.to_empty`` makes room for what is loaded then."""
    return _to_copy(func, weight, **kwargs)


def _copy(func: Any, target: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, QuantizedWeight):
        return NotImplemented
    if not isinstance(source, QuantizedWeight):
        raise ValueError(
            f"scattermoe: copy_ to a quantized weight ({target._layout}): expected one of its format, got a dense "
            f"{source.dtype}; load dense weights first and quantize then"
        )
    names, (layout, _, *others) = target.__tensor_flatten__()
    _, (source_layout, _, *source_others) = source.__tensor_flatten__()
    if (layout, others, target.shape) != (source_layout, source_others, source.shape):
        raise ValueError(f"scattermoe: copy_ to a quantized weight: expected {target!r}, got {source!r}")
    if not source.is_meta:
        source.stack.refuse_nan("copy_ to a quantized weight")
    for name in names:
        # Scales that serve all experts are one number in memory.
        part = getattr(target, name)
        if 0 in part.stride() and part.numel() > 1:
            part = part.clone(memory_format=torch.contiguous_format)
            setattr(target, name, part)
        part.copy_(getattr(source, name), non_blocking)
    return target


def _select(func: Any, weight: QuantizedWeight, dim: int, index: int) -> Any:
    return _of_experts(weight, [index]).squeeze(0) if dim in (0, -3) and weight.dim() == 3 else NotImplemented


def _index(func: Any, weight: Any, indices: Sequence[torch.Tensor | None]) -> Any:
    numbers, *rest = indices
    if (
        not isinstance(weight, QuantizedWeight)
        or weight.dim() != 3
        or any(index is not None for index in rest)
        or not isinstance(numbers, torch.Tensor)
        or numbers.dim() != 1
        or numbers.dtype == torch.bool
        or type(numbers) is not torch.Tensor
    ):
        return NotImplemented
    return _of_experts(weight, numbers.tolist())


def _of_experts(weight: QuantizedWeight, experts: list[int]) -> torch.Tensor:
    count = weight.shape[0]
    for expert in experts:
        if not -count <= expert < count:
            raise IndexError(f"index {expert} is out of bounds for dimension 0 with size {count}")
    return weight._decoded([expert % count for expert in experts])


def _view(func: Any, weight: QuantizedWeight, size: Sequence[int]) -> Any:
    if list(size) not in ([-1], [weight.numel()], list(weight.shape)):
        return NotImplemented
    return QuantizedWeight(weight.stack, is_flat=len(size) == 1)


def _as_strided(func: Any, weight: QuantizedWeight, size: Any, stride: Any, offset: int | None = None) -> Any:
    if (tuple(size), tuple(stride), offset or 0) != (tuple(weight.shape), weight.stride(), 0):
        return NotImplemented
    return QuantizedWeight(weight.stack)


def _slice(
    func: Any, weight: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    if weight.dim() != 3 or step != 1:
        return NotImplemented
    first, last, _ = slice(start, end).indices(weight.shape[dim])
    if (first, last) == (0, weight.shape[dim]):
        return QuantizedWeight(weight.stack)
    if dim not in (0, -3):
        return NotImplemented
    return QuantizedWeight(parts.take_experts(weight.stack, first, max(first, last)))


def _split(func: Any, weight: QuantizedWeight, size: int, dim: int = 0) -> Any:
    experts = weight.shape[0]
    if dim not in (0, -3) or weight.dim() != 3:
        return NotImplemented
    if experts % size:
        raise NotImplementedError(
            f"scattermoe: a quantized weight {list(weight.shape)} cannot be split in parts of {size} experts: expected "
            "a number of processes that divides the experts"
        )
    stack = weight.stack
    return [QuantizedWeight(parts.take_experts(stack, i, i + size)) for i in range(0, experts, size)]


def _new_zeros(func: Any, weight: QuantizedWeight, size: Sequence[int], **kwargs: Any) -> Any:
    if weight.dim() != 3 or len(size) != 3 or list(size[1:]) != list(weight.shape[1:]):
        return _without_numbers(func, weight, size, **kwargs)
    return QuantizedWeight(parts.zeros(weight.stack, size[0]))


def _without_numbers(func: Any, weight: QuantizedWeight, *args: Any, **kwargs: Any) -> torch.Tensor:
    shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return func(shape, *args, **{**kwargs, "device": kwargs.get("device") or weight.device})


_warned: set[str] = set()


def _on_dense(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operator's result for the dense copies of quantized arguments."""
    names = [argument.name for argument in func._schema.arguments]
    is_written = {
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if name in is_written and isinstance(value, QuantizedWeight):
            raise RuntimeError(
                f"scattermoe: {func}: a quantized weight {list(value.shape)} cannot be written to; call "
                "dequantize_experts(model) first"
            )

    def dense(value: Any) -> Any:
        if not isinstance(value, QuantizedWeight):
            return value
        subject = f"{func} on a quantized weight {list(value.shape)}"
        if subject not in _warned:
            _warned.add(subject)
            warnings.warn(f"scattermoe: {subject} decodes all of it, in {value.dtype}", stacklevel=4)
        return value.dequantize()

    return func(*torch.utils._pytree.tree_map(dense, args), **torch.utils._pytree.tree_map(dense, kwargs))


def _gather(func: Any, weight: QuantizedWeight, *args: Any) -> QuantizedWeight:
    return _with_parts(weight, lambda part: func(part.contiguous(), *args))


def _wait(func: Any, weight: QuantizedWeight) -> QuantizedWeight:
    return _with_parts(weight, torch.ops._c10d_functional.wait_tensor.default)


# What DTensor gathers with, by name, for torch defines the last one when it first does.
_COLLECTIVES = {
    "_c10d_functional::all_gather_into_tensor": _gather,
    "_c10d_functional::wait_tensor": _wait,
    "_c10d_functional::_wrap_tensor_autograd": _wait,
}

_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same_on_parts,
    aten.alias.default: _same_on_parts,
    aten.clone.default: _same_on_parts,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.view.default: _view,
    aten.as_strided.default: _as_strided,
    aten.new_zeros.default: _new_zeros,
    aten.index.Tensor: _index,
    **dict.fromkeys(
        (
            aten.zeros_like.default,
            aten.ones_like.default,
            aten.full_like.default,
            aten.rand_like.default,
            aten.randn_like.default,
            aten.new_empty.default,
            aten.new_ones.default,
            aten.new_full.default,
        ),
        _without_numbers,
    ),
}
