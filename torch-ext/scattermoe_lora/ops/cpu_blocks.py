"""Rows of several experts, padded to the same number for each, so that a product of all of them is one call.

An expert has a few dozen rows. On a CPU its low-rank products and the gradients of its factors take less time than it
takes to call them; as a batch they take a fraction. Rows that pad are zero and add nothing to a sum over rows.
"""

from __future__ import annotations

import torch

# Bytes of a buffer of one block's rows, of which there are a dozen; less costs time, and more memory.
_BLOCK_BYTES = 1 << 21
# The rows of a block's largest expert may be so many times those of its smallest.
_MOST_PADDING = 1.5


def padded(rows: int) -> int:
    """The next number of rows that blocks have: a multiple of 16, and of a sixteenth of the next power of two."""
    step = max(16, (1 << rows.bit_length()) // 16)
    return -(-rows // step) * step


class Block:
    """Some experts with rows, and their rows, one expert's after the other's.

    Attributes:
        experts: The experts, a list.
        index: The same as a tensor.
        counts: The number of rows of each of them.
        positions: The positions of their rows in the order that :func:`split` returns, a slice.
        rows: The number of rows of each with padding.
        size: The number of rows of all with padding.
    """

    def __init__(self, experts: list[int], start: int, counts: list[int]) -> None:
        self.experts, self.index = experts, torch.tensor(experts)
        self.counts = counts
        self.positions = slice(start, start + sum(counts))
        self.rows = padded(max(counts))
        self.size = len(counts) * self.rows
        is_own = torch.arange(self.rows) < torch.tensor(counts).unsqueeze(1)
        self._own = is_own.view(-1).nonzero().squeeze(1)
        self._padding = is_own.logical_not_().view(-1).nonzero().squeeze(1)

    def gather(self, source: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The rows of ``source`` ``[*, n]`` that ``index`` ``[S]`` has for this block's positions.

        Returns:
            ``[size, n]``, the first rows of ``out``, those that pad set to zero.
        """
        places = index.new_zeros(self.size).index_copy_(0, self._own, index[self.positions])
        out = torch.index_select(source, 0, places, out=out[: self.size])
        return out.index_fill_(0, self._padding, 0)

    def own(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``rows`` ``[size, n]`` without those that pad."""
        return torch.index_select(rows, 0, self._own, out=out)

    def by_expert(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` ``[size, n]`` as ``[experts, rows, n]``, a view."""
        return rows.view(len(self.counts), self.rows, rows.shape[1])

    def of(self, stack: torch.Tensor) -> torch.Tensor:
        """These experts' part of a stack ``[E, ...]``, its matrices transposed in memory if they are there."""
        if stack.dim() == 3 and stack.mT.is_contiguous():
            return stack.mT.index_select(0, self.index).mT
        return stack.index_select(0, self.index)


def split(order: torch.Tensor, offsets: torch.Tensor, row_bytes: int) -> tuple[torch.Tensor, list[Block]]:
    """Every expert that has rows, in blocks of as many as fit their buffers, those with most rows first.

    Experts of a block have about the same number of rows, however unequal the router is, so that few rows pad. Their
    number is a power of two, so that few sizes occur: oneDNN generates code for every size that it meets.

    Args:
        order, offsets: ``[S]`` and ``[E + 1]``, of a :class:`scattermoe_lora.ops.routing.Routing`.
        row_bytes: The size of a row of the widest buffer.

    Returns:
        ``order`` with the pairs in the blocks' order, those without an expert last as before, and the blocks.
    """
    starts = offsets.tolist()
    counts = offsets.diff().tolist()
    experts = [expert for expert, count in enumerate(counts) if count]
    experts.sort(key=counts.__getitem__, reverse=True)
    blocks = []
    first = start = 0
    while first < len(experts):
        rows = padded(counts[experts[first]])
        number = 1
        while (
            first + 2 * number <= len(experts)
            and 2 * number * rows * row_bytes <= _BLOCK_BYTES
            and rows <= _MOST_PADDING * padded(counts[experts[first + 2 * number - 1]])
        ):
            number *= 2
        block_experts = experts[first : first + number]
        blocks.append(Block(block_experts, start, [counts[expert] for expert in block_experts]))
        first, start = first + number, blocks[-1].positions.stop
    pieces = [order[starts[expert] : starts[expert + 1]] for expert in experts]
    return torch.cat([*pieces, order[starts[-1] :]]), blocks
