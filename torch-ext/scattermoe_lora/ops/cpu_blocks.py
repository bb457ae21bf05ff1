"""Rows of consecutive experts, padded to the same number for each, so that a product of all of them is one call.

An expert has a few dozen rows. On a CPU its low-rank products and the gradients of its factors take less time than it
takes to call them; as a batch they take a fraction. Rows that pad are zero and add nothing to a sum over rows.
"""

from __future__ import annotations

import torch

# Bytes of a buffer of one block's rows, of which there are a dozen; less costs time, and more memory.
_BLOCK_BYTES = 1 << 21
# Rows of a block may be so many times those that its experts need one by one.
_MOST_PADDING = 1.5


def padded(rows: int) -> int:
    """The next number of rows that blocks have: a multiple of 16, and of a sixteenth of the next power of two."""
    step = max(16, (1 << rows.bit_length()) // 16)
    return -(-rows // step) * step


class Block:
    """Consecutive experts, and their rows in sorted order.

    Attributes:
        experts: The experts, a slice.
        counts: The number of rows of each of them.
        positions: Their rows' sorted positions, a slice.
        rows: The number of rows of each with padding.
        size: The number of rows of all with padding.
        unused: The numbers, among ``experts``, of those without rows.
    """

    def __init__(self, first: int, start: int, counts: list[int]) -> None:
        self.experts = slice(first, first + len(counts))
        self.counts = counts
        self.positions = slice(start, start + sum(counts))
        self.rows = padded(max(counts))
        self.size = len(counts) * self.rows
        is_own = torch.arange(self.rows) < torch.tensor(counts).unsqueeze(1)
        self.unused = torch.tensor(
            [expert for expert, count in enumerate(counts) if not count], dtype=torch.int64
        )
        self._own = is_own.view(-1).nonzero().squeeze(1)
        self._padding = is_own.logical_not_().view(-1).nonzero().squeeze(1)

    def gather(self, source: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The rows of ``source`` ``[*, n]`` that ``index`` ``[S]`` has for this block's sorted positions.

        Returns:
            ``[size, n]``, the first rows of ``out``, those that pad set to zero.
        """
        places = index.new_zeros(self.size).index_copy_(0, self._own, index[self.positions])
        out = torch.index_select(source, 0, places, out=out[: self.size])
        return out.index_fill_(0, self._padding, 0)

    def own(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``rows`` ``[size, n]`` without those that pad, in sorted order."""
        return torch.index_select(rows, 0, self._own, out=out)

    def by_expert(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` ``[size, n]`` as ``[experts, rows, n]``, a view."""
        return rows.view(len(self.counts), self.rows, rows.shape[1])


def split(offsets: torch.Tensor, row_bytes: int) -> list[Block]:
    """Every expert that has rows, in blocks of as many rows as fit their buffers.

    Blocks come of halving, so that few sizes occur: oneDNN generates code for every size that it meets.

    Args:
        offsets: ``[E + 1]``, of a :class:`scattermoe_lora.ops.routing.Routing`.
        row_bytes: The size of a row of the widest buffer.
    """
    starts = offsets.tolist()
    all_counts = offsets.diff().tolist()
    blocks = []
    ranges = [(0, len(all_counts))]
    while ranges:
        first, last = ranges.pop()
        counts = all_counts[first:last]
        size = len(counts) * padded(max(counts, default=0))
        too_large = size * row_bytes > _BLOCK_BYTES or size > _MOST_PADDING * sum(map(padded, counts))
        if too_large and len(counts) > 1:
            middle = (first + last) // 2
            ranges += [(middle, last), (first, middle)]
        elif size:
            blocks.append(Block(first, starts[first], counts))
    return blocks
