"""Quantized weights among the parameters that DistributedDataParallel broadcasts when it is made: as codes and scales.

It lays parameters of one dtype in a row, broadcasts that, cuts it, and copies what it got to each parameter. Quantized
weights have no numbers in memory to be laid there; the row keeps them, and what is broadcast are their parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch


class Row(torch.Tensor):
    """One-dimensional tensors one after the other, some of them quantized, each kept as it is."""

    parts: Sequence[torch.Tensor]

    @staticmethod
    def __new__(cls, parts: Sequence[torch.Tensor]) -> Row:
        first = parts[0]
        size = sum(part.numel() for part in parts)
        return torch.Tensor._make_wrapper_subclass(cls, (size,), dtype=first.dtype, device=first.device)

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self.parts = parts

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.slice.Tensor:
            row, _, start, end = args
            for part in row.parts:
                if (start, end) == (0, part.numel()):
                    return torch.ops.aten.alias.default(part)
                start, end = start - part.numel(), end - part.numel()
        if func._schema.name == "c10d::broadcast_":
            return broadcast(func, *args)
        raise NotImplementedError(f"scattermoe: {func} on quantized weights in a row with others")


def broadcast(func: Any, tensors: Sequence[Any], *arguments: Any) -> tuple[Sequence[Any], Any]:
    """``c10d::broadcast_`` of quantized weights, or rows with some, in place: the tensors, and what to wait for."""
    from torch._C._distributed_c10d import Work

    works = [func([part], *arguments)[1] for part in _stored(tensors)]
    for work in works[:-1]:
        Work.unbox(work).wait()
    return tensors, works[-1]


def _stored(tensors: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors of numbers of which others consist."""
    for tensor in tensors:
        if isinstance(tensor, Row):
            yield from _stored(tensor.parts)
        elif hasattr(tensor, "codes"):
            for name in tensor.__tensor_flatten__()[0]:
                # Scales that serve all experts are one number in memory.
                setattr(tensor, name, getattr(tensor, name).contiguous())
                yield getattr(tensor, name)
        else:
            yield tensor
