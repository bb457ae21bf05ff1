"""Schedules: the tiles of rows that the grouped GEMMs walk over, listed once for all launches of a call.

Without one every program counts the tiles of all experts before it multiplies.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, next_power_of_2
from ..launcher import launch_kernel
from ..routing import Routing
from .kernels_schedule import tile_schedule_kernel

TILES_A_PROGRAM = 128
"""Tiles that a program of the kernel that lists them writes at a time."""


def most_tiles(pairs: int, num_experts: int, block: int) -> int:
    """The most tiles of ``block`` rows that any routing gives: one is begun for every segment that has rows, and the
    others are full."""
    return pairs // block + min(pairs, num_experts + 1)


def tile_schedules(routing: Routing, block: int, size: int) -> torch.Tensor:
    """The tiles of ``block`` rows of each share of ``size`` consecutive experts, ``[shares, 1 + tiles, 3]`` int32;
    nothing waits for the device.

    The first entry of a share counts its tiles of experts, and all that have rows; its third number is not written. The
    others are segment, first row and end of each tile, in order; those past the last tile have no rows. Segments are
    the share's experts from 0, and ``size`` the pairs without an expert, which belong to the last share.
    """
    pairs, num_experts = routing.order.shape[0], routing.offsets.shape[0] - 1
    shares = cdiv(num_experts, size)
    capacity = most_tiles(pairs, size, block)
    if shares > 1:
        # So that every list begins at a multiple of 16 bytes: Triton compiles anew for an address that does not.
        capacity += -(capacity + 1) % 4
    schedules = torch.empty((shares, 1 + capacity, 3), dtype=torch.int32, device=routing.offsets.device)
    launch_kernel(
        tile_schedule_kernel,
        (num_experts + 1, 1, 1),
        (routing.offsets, schedules, pairs, num_experts, size, capacity),
        {"EXPERTS_POW2": next_power_of_2(num_experts + 1), "BLOCK_M": block, "TILES": TILES_A_PROGRAM},
    )
    return schedules


class Scheduled(Routing):
    """A routing with the schedules that the launches of one call share: each is made when it is first asked for.

    Attributes:
        rows: Rows an expert, on average.
    """

    def __init__(self, order: torch.Tensor, offsets: torch.Tensor) -> None:
        self._schedules: dict[tuple[int, int], torch.Tensor] = {}
        self.rows = order.shape[0] / (offsets.shape[0] - 1)

    def schedules(self, block: int, size: int) -> torch.Tensor:
        """:func:`tile_schedules` of this routing."""
        if (block, size) not in self._schedules:
            self._schedules[block, size] = tile_schedules(self, block, size)
        return self._schedules[block, size]
