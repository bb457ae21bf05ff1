"""The arguments of the attention operators, but for gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .window import Window


class Operands(NamedTuple):
    """Queries, keys and values, and where the sequences in them begin.

    Attributes:
        q: ``[B, Sq, Hq, D]``, or ``[Tq, Hq, D]`` with ``cu_seqlens``; the last stride is 1, as in ``k`` and ``v``.
        k: ``[B, Sk, Hkv, D]`` or ``[Tk, Hkv, D]``.
        v: Like ``k``, or None: the keys are the values, too.
        cu_seqlens_q, cu_seqlens_k: ``[B + 1]`` int32, where each sequence starts; both or neither.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None

    @property
    def boundaries(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``cu_seqlens`` of queries and keys, or None where every row of the batch is one sequence."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return None
        return self.cu_seqlens_q, self.cu_seqlens_k

    @property
    def values(self) -> torch.Tensor:
        """The values, which may be the keys."""
        return self.k if self.v is None else self.v


class Settings(NamedTuple):
    """The numbers that scores and mask depend on.

    Attributes:
        max_seqlen_q, max_seqlen_k: No sequence is longer.
        scale: Factor of the scores.
        left, right: The fields of a :class:`scattermoe_lora.ops.attention.window.Window`.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: they stay.
    """

    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    left: int
    right: int
    softcap: float

    @property
    def window(self) -> Window:
        """The window, without the bounds that no sequence reaches."""
        return Window(self.left, self.right).within(self.max_seqlen_q, self.max_seqlen_k)
