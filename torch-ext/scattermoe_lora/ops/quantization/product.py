"""Products with a stack of quantized matrices on a CPU: a matrix is decoded, multiplied and forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import overload

import torch

from ..cpu_matmul import add_matmul
from .cpu import Decoder
from .stack import QuantizedStack


class Matrices(Sequence[torch.Tensor]):
    """The matrices of a quantized stack, each decoded when it is asked for, as ``dense.unbind()`` would list them.

    All share one workspace: a matrix is valid until the next one is asked for.

    Args:
        stack: Quantized matrices ``[E, N, K]``.
        dtype: The dtype to decode to; by default the one that the stack stands for.
    """

    def __init__(self, stack: QuantizedStack, dtype: torch.dtype | None = None) -> None:
        self._stack, self._decoder = stack, Decoder(stack)
        self._workspace = torch.empty(stack.stored_shape[1:], dtype=dtype or stack.dtype, device=stack.device)

    def __len__(self) -> int:
        return self._stack.shape[0]

    @overload
    def __getitem__(self, expert: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, expert: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, expert: int | slice) -> torch.Tensor | Sequence[torch.Tensor]:
        if isinstance(expert, slice):
            raise TypeError("matrices of a quantized stack share a workspace: ask for one at a time")
        matrix = self._decoder.decode(expert, self._workspace)
        return matrix.mT if self._stack.format.transposed else matrix


def grouped_matmul(x: torch.Tensor, stack: QuantizedStack, offsets: torch.Tensor) -> torch.Tensor:
    """``x[s] W[e]^T`` for the rows of each expert; with ``stack.mT`` the gradient of ``x``, ``dy[s] W[e]``.

    Args:
        x: ``[S, K]`` in sorted order, in a dtype that the stack decodes to; contiguous.
        stack: ``[E, N, K]``.
        offsets: ``[E + 1]``, where each expert's rows start; those behind the last one's give zeros.

    Returns:
        ``[S, N]``. Beside it one matrix is allocated, and only experts that have rows are decoded.
    """
    out = x.new_zeros((x.shape[0], stack.shape[1]))
    matrices = Matrices(stack.mT, x.dtype)
    for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
        if start < end:
            add_matmul(x[start:end], matrices[expert], out[start:end])
    return out
