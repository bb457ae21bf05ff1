"""LoRA on experts that transformers' expert parallelism has split: a process holds some, but factors of all.

The weights are then ``DTensor``s that are split along the experts. Each process takes the factors of its own experts,
without communication; in the backward the gradients of all of them are gathered, so that the factors stay equal on all
processes, and what is saved is the whole adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...ops.grouped_linear.adapters import Adapter
from .checks import LowRank

_HANDED = "_scattermoe_lora"


def is_split(experts: Any, parameter: torch.Tensor) -> bool:
    """Tell whether a parameter of the experts module is spread over processes, and its forward sees this one's part."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return False
    from torch.distributed.fsdp import FSDPModule

    # FSDP2 around the experts themselves, alone, gathers them for their forward. Whatever else split them, too, has
    # made another dimension of the mesh.
    dimensions = sum(not placement.is_replicate() for placement in parameter.placements)
    return not (isinstance(experts, FSDPModule) and dimensions == 1)


def check_split(experts: Any, name: str, parameter: Any) -> None:
    """Raises NotImplementedError where factors cannot be taken apart as the parameter was.

    Args:
        experts: The experts module.
        name: The parameter's name in it.
        parameter: The parameter, which :func:`is_split`.
    """
    from torch.distributed.tensor import Shard

    parallel = getattr(experts.config, "distributed_config", None)
    if parallel is not None and (parallel.ep_size or 1) > (parallel.tp_size or 1):
        # Each batch's gradients would be summed here and averaged elsewhere, or not.
        raise NotImplementedError(
            f"scattermoe: LoRA on {name}: expected processes of one expert-parallel group to share their batch, got "
            f"ep_size={parallel.ep_size} with tp_size={parallel.tp_size or 1}; make the two equal"
        )
    if tuple(parameter.placements) != (Shard(0),):
        raise NotImplementedError(
            f"scattermoe: LoRA on {name}: expected a weight that is whole or split along its experts alone (an ep_plan "
            f"of transformers), got placements {tuple(parameter.placements)}"
        )


def own_part(factors: LowRank, parameter: Any) -> LowRank:
    """The factors of this process's experts: of ``[E, *, *]`` the part that ``parameter`` has here."""
    a, b = (_own_part(factor, parameter) for factor in factors)
    return a, b


def own_adapters(adapters: Sequence[Adapter], parameter: Any) -> list[Adapter]:
    """The adapters of this process's experts, likewise."""
    return [
        Adapter(
            *own_part((adapter.a, adapter.b), parameter),
            None if adapter.bias is None else _own_part(adapter.bias, parameter),
            None if adapter.magnitude is None else _own_part(adapter.magnitude, parameter),
            adapter.dropout,
        )
        for adapter in adapters
    ]


def of_all(part: torch.Tensor, parameter: Any) -> torch.Tensor:
    """``[E, N]`` of all experts, of the rows that each process has of those that ``parameter`` has there."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((parameter.shape[0], part.shape[1]))
    split = DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=(part.shape[1], 1),
    )
    return split.full_tensor()


def split_as(whole: torch.Tensor, parameter: Any) -> Any:
    """A ``DTensor`` of what every process has the whole of, split over them as ``parameter`` is."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole, mesh, mesh.ndim * [Replicate()], run_check=False)
    return everywhere.redistribute(mesh, parameter.placements)


def _own_part(factor: torch.Tensor, parameter: Any) -> torch.Tensor:
    return split_as(factor, parameter).to_local().contiguous()


@contextmanager
def handed(
    experts: Any, lora: Mapping[str, LowRank], adapters: Mapping[str, Sequence[Adapter]]
) -> Iterator[None]:
    """Within it, :func:`handed_factors` of the module are ``lora`` and ``adapters``.

    transformers puts a function of its own before an expert-parallel module's forward, and that takes no arguments but
    the interface's.
    """
    setattr(experts, _HANDED, (lora, adapters))
    try:
        yield
    finally:
        delattr(experts, _HANDED)


def handed_factors(experts: Any) -> tuple[Mapping[str, LowRank], Mapping[str, Sequence[Adapter]]]:
    """The factors and adapters that the module was handed, if any."""
    return getattr(experts, _HANDED, None) or ({}, {})
