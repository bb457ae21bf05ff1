"""What torch's operators do with a tensor that keeps its numbers in other tensors, whatever their format.

Such a class has ``map_tensors(function)``, which makes another of it of what a function makes of these tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

aten = torch.ops.aten


def handler(func: Any) -> Callable[..., Any] | None:
    """What computes an operator that is the same for all formats: ``handler(func)(func, tensor, ...)``."""
    return _HANDLERS.get(func) or _COLLECTIVES.get(func._schema.name)


def _on_tensors(func: Any, tensor: Any, **kwargs: Any) -> Any:
    kwargs.pop("memory_format", None)
    result = tensor.map_tensors(lambda part: func(part, **kwargs))
    return return_and_correct_aliasing(func, (tensor,), kwargs, result)


def _as_strided(func: Any, tensor: Any, size: Any, stride: Any, offset: int | None = None) -> Any:
    if (tuple(size), tuple(stride), offset or 0) != (tuple(tensor.shape), tensor.stride(), 0):
        return NotImplemented
    return tensor.map_tensors(lambda part: part)


def without_numbers(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The dense result of an operator that takes no more than shape, dtype and device of its argument."""
    shape = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return func(shape, *args, **{**kwargs, "device": kwargs.get("device") or tensor.device})


def _gather(func: Any, tensor: Any, *args: Any) -> Any:
    return tensor.map_tensors(lambda part: func(part.contiguous(), *args))


def _wait(func: Any, tensor: Any) -> Any:
    return tensor.map_tensors(torch.ops._c10d_functional.wait_tensor.default)


# What DTensor gathers with, by name, for torch defines the last one when it first does.
_COLLECTIVES = {
    "_c10d_functional::all_gather_into_tensor": _gather,
    "_c10d_functional::wait_tensor": _wait,
    "_c10d_functional::_wrap_tensor_autograd": _wait,
}

_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _on_tensors,
    aten.alias.default: _on_tensors,
    aten.clone.default: _on_tensors,
    aten.as_strided.default: _as_strided,
    aten.new_empty.default: without_numbers,
}
