"""Sorting token-expert pairs and summing over a token's choices, by torch or, where a table has a rule, by Triton.

Both are a few percent of a layer. torch sorts by radix, in passes over 64 bits; here the pairs of each expert are
counted, block by block, and then each pair's place is known (a counting sort, stable).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .. import tile_tables
from ..dispatch import undisturbed
from ..launch import cdiv, next_power_of_2
from ..launcher import launch_kernel
from .kernels_pairs import count_pairs_kernel, place_pairs_kernel, sum_choices_kernel

TILES = Path(__file__).parent / "tiles"

CHUNK = 16
"""Pairs that a whole block is compared with at a time."""


def own_launch(kernel: str, like: torch.Tensor, sizes: Mapping[str, float]) -> Mapping[str, int] | None:
    """The launch of the first rule that serves these sizes; None where the device's table has none, and torch's own
    operators do what the kernel does."""
    return tile_tables.lookup(TILES, tile_tables.table_of(like.device), kernel, like.dtype.itemsize, sizes)


def sort_pairs(expert_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``order`` and ``offsets`` of a :class:`scattermoe_lora.ops.routing.Routing`, or None where torch sorts.

    A rule ``sort_pairs`` has limits of ``pairs`` and ``experts``, and a launch with the ``BLOCK`` of pairs that a
    program places.

    Args:
        expert_index: ``[T, K]``, int32 or int64; what is no expert's index is a sentinel.
        num_experts: E.
    """
    index = expert_index.reshape(-1)
    pairs = index.shape[0]
    launch = own_launch("sort_pairs", index, {"pairs": pairs, "experts": num_experts}) if pairs else None
    if launch is None:
        return None
    blocks = cdiv(pairs, launch["BLOCK"])
    constants = {"EXPERTS_POW2": next_power_of_2(num_experts + 1), **launch}
    counts = torch.empty((num_experts + 1) * blocks, dtype=torch.int32, device=index.device)
    order = torch.empty(pairs, dtype=torch.int64, device=index.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int64, device=index.device)
    with undisturbed(index):
        launch_kernel(count_pairs_kernel, (blocks, 1, 1), (index, counts, pairs, num_experts), constants)
        through = counts.cumsum(0, dtype=torch.int32)
        launch_kernel(
            place_pairs_kernel,
            (blocks, 1, 1),
            (index, counts, through, order, offsets, pairs, num_experts),
            {"CHUNK": CHUNK, **constants},
        )
    return order, offsets


def sum_choices(by_pair: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[S, N]`` by pair to ``[T, N]``: each token's rows summed in float32, in a fixed order.

    A rule ``sum_choices`` has limits of ``n`` (columns) and ``k`` (choices), and a launch with the ``BLOCK`` of columns
    that a program sums.
    """
    pairs, columns = by_pair.shape
    top_k = pairs // max(tokens, 1)
    launch = own_launch("sum_choices", by_pair, {"n": columns, "k": top_k}) if pairs else None
    if launch is None:
        return by_pair.view(tokens, top_k, columns).sum(dim=1)
    out = by_pair.new_empty((tokens, columns))
    grid = (tokens, cdiv(columns, launch["BLOCK"]), 1)
    launch_kernel(sum_choices_kernel, grid, (by_pair, out, columns), {"TOP_K": top_k, **launch})
    return out
