"""Schedules: the tiles of rows that the grouped GEMMs walk over, listed once for all launches of a call.

Without one every program counts the tiles of all experts before it multiplies.
"""

from __future__ import annotations

import torch

from ..launch import next_power_of_2
from ..launcher import launch_kernel
from ..routing import Routing
from .kernels_schedule import tile_schedule_kernel

TILES_A_PROGRAM = 128
"""Tiles that a program of the kernel that lists them writes at a time."""


def most_tiles(pairs: int, num_experts: int, block: int) -> int:
    """The most tiles of ``block`` rows that any routing gives: one is begun for every segment that has rows, and the
    others are full."""
    return pairs // block + min(pairs, num_experts + 1)


def tile_schedule(routing: Routing, block: int) -> torch.Tensor:
    """The tiles of ``block`` rows, ``[1 + tiles, 3]`` int32; nothing waits for the device.

    The first entry counts the tiles of experts, and all that have rows; its third number is not written. The others are
    segment, first row and end of each tile, in order; those past the last tile have no rows.
    """
    num_experts = routing.offsets.shape[0] - 1
    capacity = most_tiles(routing.order.shape[0], num_experts, block)
    pairs = routing.last if isinstance(routing, Scheduled) else routing.order.shape[0]
    schedule = torch.empty((1 + capacity, 3), dtype=torch.int32, device=routing.offsets.device)
    launch_kernel(
        tile_schedule_kernel,
        (num_experts + 1, 1, 1),
        (routing.offsets, schedule, pairs, num_experts, capacity),
        {"EXPERTS_POW2": next_power_of_2(num_experts + 1), "BLOCK_M": block, "TILES": TILES_A_PROGRAM},
    )
    return schedule


class Scheduled(Routing):
    """A routing with the schedules that the launches of one call share: each is made when it is first asked for.

    Attributes:
        rows: Rows an expert, on average.
        last: The position behind the last pair that a launch writes, those without an expert among them; 0 where it
            writes only the pairs of its experts.
        is_whole: Whether the experts are all, and not a share.
    """

    def __init__(self, order: torch.Tensor, offsets: torch.Tensor) -> None:
        self._schedules: dict[int, torch.Tensor] = {}
        self.rows = order.shape[0] / (offsets.shape[0] - 1)
        self.last = order.shape[0]
        self.is_whole = True

    def share(self, experts: slice) -> Scheduled:
        """The pairs of some consecutive experts; to the last expert's belong the pairs that have none."""
        share = Scheduled(self.order, self.offsets[experts.start : experts.stop + 1])
        share.rows, share.is_whole = self.rows, False
        if experts.stop < self.offsets.shape[0] - 1:
            share.last = 0
        return share

    def schedule(self, block: int) -> torch.Tensor:
        """:func:`tile_schedule` of this routing."""
        if block not in self._schedules:
            self._schedules[block] = tile_schedule(self, block)
        return self._schedules[block]
