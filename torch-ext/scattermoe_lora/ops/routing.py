"""Sorting token-expert pairs by expert: the order that every grouped kernel walks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import dispatch


class Routing(NamedTuple):
    """Token-expert pairs sorted by expert.

    A pair is numbered ``t * K + k``: the k-th choice of token t. Within an expert the pairs keep that order,
    so that the same routing always gives the same sums, bit for bit.

    Attributes:
        order: ``[S]`` int64, the pair at each sorted position. Pairs of experts outside ``[0, E)`` (the sentinels of
            expert parallelism) stand at the end, beyond ``offsets[E]``.
        offsets: ``[E + 1]`` int64, where each expert's pairs start in ``order``; ``offsets[E]`` is the number of
            pairs that have an expert here.
    """

    order: torch.Tensor
    offsets: torch.Tensor


def sort_by_expert(expert_index: torch.Tensor, num_experts: int) -> Routing:
    """Sorts the pairs of ``expert_index`` by expert.

    Args:
        expert_index: ``[T, K]`` integers; values ``>= num_experts`` are sentinels that no expert here handles. Negative
            ones are an error, which :func:`refuse_index_outside` sees on the CPU; a GPU takes them for sentinels.
        num_experts: E.

    Returns:
        The :class:`Routing`. Its shapes depend on ``T``, ``K`` and ``E`` alone, so nothing waits for the device.
    """
    # Where a graph is made the compiler chooses the kernels.
    if not torch.compiler.is_compiling() and dispatch.use_triton(expert_index):
        from .grouped_linear.pairs import sort_pairs

        result = sort_pairs(expert_index, num_experts)
        if result is not None:
            return Routing(*result)
    if expert_index.device.type != "cpu":
        # Nobody would see them there, and what no kernel writes would be returned as it was found.
        expert_index = torch.where(expert_index < 0, num_experts, expert_index)
    sorted_index, order = torch.sort(expert_index.reshape(-1), stable=True)
    experts = torch.arange(num_experts + 1, device=expert_index.device, dtype=sorted_index.dtype)
    return Routing(order, torch.searchsorted(sorted_index, experts))


def refuse_index_outside(order: torch.Tensor, offsets: torch.Tensor, sentinels: bool) -> None:
    """Raises ValueError where an expert index was negative, or too large and ``sentinels`` are not expected.

    Negative ones stand before the first expert's pairs, those that are too large behind the last one's. Looks on the
    CPU alone, where it costs nothing; on a GPU it would have to wait for the device.
    """
    if offsets.device.type != "cpu":
        return
    first, *_, last = offsets.tolist()
    if first > 0:
        raise ValueError(f"expert_index: expected values >= 0, got {first} negative ones")
    outside = order.shape[0] - last
    if outside and not sentinels:
        experts = offsets.shape[0] - 1
        raise ValueError(
            f"expert_index: expected values < {experts} (the number of experts), got {outside} larger ones"
        )


def empty_gradient(like: torch.Tensor) -> torch.Tensor:
    """An uninitialised gradient of ``like``: contiguous, or the transposed view of something contiguous like ``like``.

    A parameter that is stored transposed then gets a gradient in its own layout, which autograd does not copy.
    """
    if like.dim() == 3 and not like.is_contiguous() and like.mT.is_contiguous():
        return torch.empty_like(like.mT, memory_format=torch.contiguous_format).mT
    return torch.empty_like(like, memory_format=torch.contiguous_format)
