"""What torch's operators do with a quantized weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from ....ops import subclass
from ....ops.quantization.stack import FLOATS
from . import broadcast, parts

aten = torch.ops.aten


def run(kind: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operator, some of whose arguments are of the class of quantized weights.

    Raises:
        RuntimeError: It would write to one.
    """
    result: Any = NotImplemented
    if shared := subclass.handler(func):
        result = shared(func, *args, **kwargs)
    elif (
        func._schema.name == "c10d::broadcast_"
    ):  # Of DistributedDataParallel, which torch defines when it needs it.
        result = broadcast.broadcast(func, *args)
    elif own := _HANDLERS.get(func):
        result = own(kind, func, *args, **kwargs)
    return _on_dense(kind, func, args, kwargs) if result is NotImplemented else result


def refuse_write(operation: Any, weight: Any) -> NoReturn:
    """Raises RuntimeError for what would write to a quantized weight."""
    raise RuntimeError(
        f"scattermoe: {operation}: a quantized weight {list(weight.shape)} cannot be written to; call "
        "dequantize_experts(model) first"
    )


def _to_copy(kind: Any, func: Any, weight: Any, **kwargs: Any) -> Any:
    dtype = kwargs.pop("dtype", None)
    kwargs.pop("memory_format", None)
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(
            f"scattermoe: a quantized weight stands for one of {', '.join(map(str, FLOATS))}, got {dtype}"
        )
    return weight.map_tensors(lambda tensor: func(tensor, **kwargs), dtype)


def _empty_like(kind: Any, func: Any, weight: Any, **kwargs: Any) -> Any:
    """Of the same format: ``Module.to_empty`` makes room for what is loaded then."""
    return _to_copy(kind, func, weight, **kwargs)


def _copy(kind: Any, func: Any, target: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, kind):
        return NotImplemented
    if not isinstance(source, kind):
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


def _select(kind: Any, func: Any, weight: Any, dim: int, index: int) -> Any:
    return _of_experts(weight, [index]).squeeze(0) if dim in (0, -3) and weight.dim() == 3 else NotImplemented


def _index(kind: Any, func: Any, weight: Any, indices: Sequence[torch.Tensor | None]) -> Any:
    numbers, *rest = indices
    if (
        not isinstance(weight, kind)
        or weight.dim() != 3
        or any(index is not None for index in rest)
        or not isinstance(numbers, torch.Tensor)
        or numbers.dim() != 1
        or numbers.dtype == torch.bool
        or type(numbers) is not torch.Tensor
    ):
        return NotImplemented
    return _of_experts(weight, numbers.tolist())


def _of_experts(weight: Any, experts: list[int]) -> torch.Tensor:
    count = weight.shape[0]
    for expert in experts:
        if not -count <= expert < count:
            raise IndexError(f"index {expert} is out of bounds for dimension 0 with size {count}")
    return weight.decode([expert % count for expert in experts])


def _view(kind: Any, func: Any, weight: Any, size: Sequence[int]) -> Any:
    if list(size) not in ([-1], [weight.numel()], list(weight.stack.shape)):
        return NotImplemented
    return kind(weight.stack, is_flat=len(size) == 1)


def _slice(
    kind: Any,
    func: Any,
    weight: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    first, last, _ = slice(start, end).indices(weight.shape[dim])
    if step == 1 and (first, last) == (0, weight.shape[dim]):
        return kind(weight.stack, is_flat=weight.dim() == 1)
    if step != 1 or weight.dim() != 3 or dim not in (0, -3):
        return NotImplemented
    return kind(parts.take_experts(weight.stack, first, max(first, last)))


def _split(kind: Any, func: Any, weight: Any, size: int, dim: int = 0) -> Any:
    experts = weight.shape[0]
    if dim not in (0, -3) or weight.dim() != 3:
        return NotImplemented
    if experts % size:
        raise NotImplementedError(
            f"scattermoe: a quantized weight {list(weight.shape)} cannot be split in parts of {size} experts: expected "
            "a number of processes that divides the experts"
        )
    stack = weight.stack
    return [kind(parts.take_experts(stack, i, i + size)) for i in range(0, experts, size)]


def _new_zeros(kind: Any, func: Any, weight: Any, size: Sequence[int], **kwargs: Any) -> Any:
    if weight.dim() != 3 or len(size) != 3 or list(size[1:]) != list(weight.shape[1:]):
        return subclass.without_numbers(func, weight, size, **kwargs)
    return kind(parts.zeros(weight.stack, size[0]))


_warned: set[str] = set()


def _on_dense(kind: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operator's result for the dense copies of quantized arguments."""
    names = [argument.name for argument in func._schema.arguments]
    is_written = {
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        for written in torch.utils._pytree.tree_leaves(value) if name in is_written else ():
            if isinstance(written, kind):
                refuse_write(func, written)

    def dense(value: Any) -> Any:
        if not isinstance(value, kind):
            return value
        subject = f"{func} on a quantized weight {list(value.shape)}"
        if subject not in _warned:
            _warned.add(subject)
            warnings.warn(f"scattermoe: {subject} decodes all of it, in {value.dtype}", stacklevel=4)
        return value.dequantize()

    return func(*torch.utils._pytree.tree_map(dense, args), **torch.utils._pytree.tree_map(dense, kwargs))


def _cat(kind: Any, func: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    if any(tensor.dim() != 1 for tensor in tensors):
        return NotImplemented
    return broadcast.Row(tensors)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.view.default: _view,
    aten.cat.default: _cat,
    aten.new_zeros.default: _new_zeros,
    aten.index.Tensor: _index,
    **dict.fromkeys(
        (
            aten.zeros_like.default,
            aten.ones_like.default,
            aten.full_like.default,
            aten.rand_like.default,
            aten.randn_like.default,
            aten.new_ones.default,
            aten.new_full.default,
        ),
        lambda kind, *args, **kwargs: subclass.without_numbers(*args, **kwargs),
    ),
}
