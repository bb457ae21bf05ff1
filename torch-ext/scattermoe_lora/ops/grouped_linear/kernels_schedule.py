"""Triton code that says which rows and columns a program of the grouped GEMMs multiplies.

A tile of rows is ``BLOCK_M`` consecutive sorted positions of one segment. Segments are the experts, then the pairs
without an expert here (segment ``num_experts``); a tile never spans two.
"""

import triton
import triton.language as tl


@triton.jit
def _segments(offsets_ptr, pairs, num_experts, EXPERTS_POW2: tl.constexpr, BLOCK_M: tl.constexpr):
    """``(segment, start, end, tiles)`` of every segment; those past the last have no tiles.

    The pairs without an expert end at ``pairs``.
    """
    segment = tl.arange(0, EXPERTS_POW2)
    start = tl.load(offsets_ptr + segment, mask=segment <= num_experts, other=0)
    end = tl.load(offsets_ptr + segment + 1, mask=segment < num_experts, other=0)
    end = tl.where(segment == num_experts, pairs, end)
    is_segment = (segment <= num_experts) & (end > start)
    tiles = tl.where(is_segment, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    return segment, start, end, tiles


@triton.jit
def read_tile(schedule_ptr, pid_m):
    """``(segment, start, end)`` of one tile of a schedule."""
    entry = schedule_ptr + 3 * (1 + pid_m)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def find_tile(
    pid_m,
    offsets_ptr,
    schedule_ptr,
    pairs,
    num_experts,
    SCHEDULE: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The segment and rows of one tile: ``(segment, start, end)``. A ``pid_m`` past the last tile has no rows.

    Read from the schedule where there is one, else counted.
    """
    if SCHEDULE:
        group, row, last = read_tile(schedule_ptr, pid_m)
    else:
        segment, start, end, tiles = _segments(offsets_ptr, pairs, num_experts, EXPERTS_POW2, BLOCK_M)
        tiles_through = tl.cumsum(tiles, axis=0)
        group = tl.sum(((tiles_through <= pid_m) & (segment <= num_experts)).to(tl.int32), axis=0)
        is_found = segment == group
        first_tile = tl.sum(tl.where(is_found, tiles_through - tiles, 0), axis=0)
        row = tl.sum(tl.where(is_found, start, 0), axis=0) + (pid_m - first_tile) * BLOCK_M
        last = tl.sum(tl.where(is_found, end, 0), axis=0)
    return group, row, last


@triton.jit
def tile_schedule_kernel(
    offsets_ptr,
    schedule_ptr,
    pairs,
    num_experts,
    size,
    capacity,
    EXPERTS_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """Lists the tiles of one segment a program, behind an entry that counts those of its share.

    A share is ``size`` consecutive experts, numbered from 0 in its list; the pairs without an expert are the last
    share's, as ``size``. A share's last program also lists those up to ``capacity``, which have no rows.
    """
    own = tl.program_id(0)
    segment, start, end, tiles = _segments(offsets_ptr, pairs, num_experts, EXPERTS_POW2, BLOCK_M)
    share = min(own // size, (num_experts - 1) // size)
    first_expert = share * size
    is_before = (segment >= first_expert) & (segment < own)
    first = tl.sum(tl.where(is_before, tiles, 0), axis=0).to(tl.int32)
    after = first + tl.sum(tl.where(segment == own, tiles, 0), axis=0).to(tl.int32)
    row = tl.sum(tl.where(segment == own, start, 0), axis=0).to(tl.int32)
    last = tl.sum(tl.where(segment == own, end, 0), axis=0).to(tl.int32)
    has_no_expert = own == num_experts
    is_last = has_no_expert | ((own + 1 == first_expert + size) & (own + 1 < num_experts))
    stop = tl.where(is_last, capacity, after)
    list_ptr = schedule_ptr + share * 3 * (1 + capacity)
    for begin in range(first, stop, TILES):
        tile = begin + tl.arange(0, TILES)
        entry = list_ptr + 3 * (1 + tile)
        in_list = tile < stop
        tl.store(entry, tl.where(has_no_expert, size, own - first_expert), mask=in_list)
        # Past the last tile the first row is behind the last one, too.
        tl.store(entry + 1, row + (tile - first) * BLOCK_M, mask=in_list)
        tl.store(entry + 2, last, mask=in_list)
    if is_last:
        tl.store(list_ptr, tl.where(has_no_expert, first, after))
        tl.store(list_ptr + 1, after)


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The tile of rows and that of columns, ``(pid_m, pid_n)``, which come at ``index``.

    GROUP_M tiles of rows take the same columns one after another, so that the L2 cache gives a weight to all of them.
    """
    first_m = index // (GROUP_M * tiles_n) * GROUP_M
    group = min(tiles_m - first_m, GROUP_M)
    return first_m + index % (GROUP_M * tiles_n) % group, index % (GROUP_M * tiles_n) // group


@triton.jit
def program_tile(columns, BLOCK: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile of this program, ``(pid_m, pid_n)``, among tiles of ``BLOCK`` of the columns."""
    tiles_n = tl.cdiv(columns, BLOCK)
    return tile_at(tl.program_id(0), tl.num_programs(0) // tiles_n, tiles_n, GROUP_M)
