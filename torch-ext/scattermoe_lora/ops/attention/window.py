"""The keys that a query may see: the mask as numbers, shared by every implementation."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch


class Window(NamedTuple):
    """A band around the diagonal that ends in the bottom right corner.

    Query i of ``Sq`` stands at key ``i + Sk - Sq`` and sees ``left`` keys before that and ``right`` behind it;
    -1 means all of them. ``(-1, -1)`` is full attention, ``(-1, 0)`` causal.
    """

    left: int
    right: int

    def within(self, queries: int, keys: int) -> Window:
        """The same window, without the bounds that sequences of at most these lengths cannot reach."""
        return Window(-1 if self.left >= keys else self.left, -1 if self.right >= queries else self.right)

    def keys(self, first: int, last: int, queries: int, keys: int) -> tuple[int, int]:
        """The range ``[begin, end)`` of keys that any of the queries ``[first, last)`` sees; empty if none does."""
        shift = keys - queries
        begin = 0 if self.left < 0 else max(0, first + shift - self.left)
        end = keys if self.right < 0 else min(keys, last + shift + self.right)
        return begin, max(begin, end)


def refuse_bad_boundaries(name: str, cu_seqlens: torch.Tensor, total: int, longest: int) -> None:
    """Raises ValueError unless ``cu_seqlens`` rises from 0 to ``total`` in steps of at most ``longest``.

    Looks on the CPU alone, where it costs nothing; on a GPU it would have to wait for the device.
    """
    if cu_seqlens.device.type != "cpu":
        return
    boundaries = cu_seqlens.tolist()
    where = f"flash_attn_varlen_func: cu_seqlens_{name}"
    if boundaries[0] != 0:
        raise ValueError(f"{where}: expected to start at 0, got {boundaries[0]}")
    lengths = [end - start for start, end in itertools.pairwise(boundaries)]
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"{where}: expected not to decrease, got {boundaries[at]}, {boundaries[at + 1]} at {at}"
        )
    if boundaries[-1] != total:
        raise ValueError(f"{where}: expected to end at {total} (the rows of {name}), got {boundaries[-1]}")
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"flash_attn_varlen_func: max_seqlen_{name}: expected at least {max(lengths)} (the longest sequence of "
            f"cu_seqlens_{name}), got {longest}"
        )
