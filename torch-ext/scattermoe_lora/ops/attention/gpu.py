"""Triton implementation: launches of the attention kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import tile_tables
from ..grouped_linear.gpu import float32_precision
from ..launch import cdiv, contiguous_like, next_power_of_2
from ..launcher import launch_kernel
from .arguments import Operands, Settings
from .descriptors import Tile, sources
from .kernels import attention_delta_kernel, attention_forward_kernel
from .kernels_backward import attention_dkdv_kernel, attention_dq_kernel

TILES = Path(__file__).parent / "tiles"
# Strides are passed in units of as many elements, so that the compiler knows a row to start at a multiple of 16 bytes.
_UNIT = 8


def _readable(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy where its rows do not start at multiples of ``_UNIT`` elements."""
    is_aligned = all(n == 1 or s % _UNIT == 0 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    return x if is_aligned else x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, rows and heads; 0 where there is one of them, or no batch."""
    *batch, rows, heads = (
        0 if n == 1 else s // _UNIT for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    )
    return (batch[0] if batch else 0, rows, heads)


def tile(
    kernel: str, like: torch.Tensor, head_dim: int, same_kv: bool, window: bool = False
) -> dict[str, int]:
    """Block sizes, ``CHUNK`` (columns of the head that are multiplied at a time), ``num_warps`` and ``num_stages``.

    Optional, and off where absent, are

    - of all ``ONE_LOOP`` (one loop goes through all blocks, and masks each), ``TMA`` (tiles of queries, keys, values
      and the result's gradient are copied by tensor descriptors, where the hardware can) and ``UNCHAIN`` (warp groups
      share the scores' columns where a chunk is the head and 64 rows have 8 warps);
    - of ``attention_forward`` and ``attention_dkdv`` ``PASSES`` (a program for each of as many parts of the columns);
    - of ``attention_dkdv`` ``SPLIT`` (a launch each for dK and dV);
    - of ``attention_dq`` ``DELTA`` (it computes delta, instead of a launch before it).

    Args:
        kernel: ``attention_forward``, ``attention_dkdv`` or ``attention_dq``.
        like: An operand; its device and element size count.
        head_dim: Size of a head, at most 512. One that is smaller than a chunk is one.
        same_kv: Whether the keys are the values.
        window: Whether a query sees only so many keys before it.

    Raises:
        NotImplementedError: No rule for elements of that size.
    """
    sizes = {"head_dim": head_dim, "same_kv": same_kv, "window": window}
    blocks = tile_tables.find(TILES, tile_tables.table_of(like.device), kernel, like.dtype, sizes)
    width = next_power_of_2(head_dim)
    # Of a part of the columns, too, a product takes 16 at least.
    most = {"CHUNK": width, "PASSES": width // 16}
    return {name: min(value, most.get(name, value)) for name, value in blocks.items()}


class _Problem:
    """The arguments that all launches of one call have in common."""

    def __init__(self, operands: Operands, settings: Settings) -> None:
        q, k, v, *_ = operands
        self.operands = operands._replace(
            q=_readable(q), k=_readable(k), v=None if v is None else _readable(v)
        )
        q, k, v, *_ = self.operands
        boundaries, window = operands.boundaries, settings.window
        is_packed = boundaries is not None
        self.batch = q.shape[0] if boundaries is None else boundaries[0].shape[0] - 1
        self.heads, head_dim = q.shape[-2:]
        self.kv_heads = k.shape[-2]
        self.longest = settings.max_seqlen_q, settings.max_seqlen_k
        self.same_kv = v is None
        self.inputs = q, k, self.operands.values
        # Unused pointers still have to be pointers.
        self.boundaries = boundaries or (q, q)
        # A packed batch is told apart by cu_seqlens alone.
        batch_stride = 0 if is_packed else q.shape[1] * self.heads * head_dim
        kv_batch_stride = 0 if is_packed else k.shape[1] * self.kv_heads * head_dim
        self.strides = (*(s for x in self.inputs for s in _strides(x)), batch_stride)
        self.kv_strides = (*self.strides, kv_batch_stride)
        lse_strides = (0 if is_packed else self.heads * q.shape[1], q.shape[-3])
        self.numbers = (*lse_strides, settings.scale, settings.softcap or 1.0, *window)
        self.constants: dict[str, Any] = {
            "VARLEN": is_packed,
            "SAME_KV": self.same_kv,
            "SOFTCAP": settings.softcap != 0,
            "LEFT": window.left >= 0,
            "RIGHT": window.right >= 0,
            "PRECISION": float32_precision(q),
            "HEAD_DIM": head_dim,
            "WIDTH": next_power_of_2(head_dim),
        }

    def tile(self, kernel: str) -> dict[str, int]:
        """The blocks and options of one of the kernels for this problem."""
        constants = self.constants
        return tile(kernel, self.operands.q, constants["HEAD_DIM"], self.same_kv, constants["LEFT"])

    def _tiles(
        self, blocks: dict[str, int], grad_out: torch.Tensor | None, by_key: bool
    ) -> tuple[list[Tile], list[Tile]]:
        """What a kernel reads in tiles of a chunk, and what it reads in tiles of other columns."""
        q, k, v = self.inputs
        rows, keys, chunk, width = (
            blocks["BLOCK_M"],
            blocks["BLOCK_N"],
            blocks["CHUNK"],
            self.constants["WIDTH"],
        )
        tiles = [Tile(q, rows, chunk), Tile(k, keys, chunk)]
        columns = width // blocks.get("PASSES", 1)
        if grad_out is None:
            return [*tiles, Tile(v, keys, columns)], []
        tiles += [Tile(v, keys, chunk), Tile(grad_out, rows, chunk)]
        if not by_key:
            return tiles, [Tile(k, keys, columns)]
        return tiles, [Tile(q, rows, columns), Tile(grad_out, rows, columns)]

    def launch(
        self,
        kernel: Any,
        blocks: dict[str, int],
        *tensors: torch.Tensor | None,
        grad_out: torch.Tensor | None = None,
        by_key: bool = False,
        **flags: bool,
    ) -> None:
        """A program for each tile of each query head's queries, or of each key head's keys and each of ``PASSES``.

        Nothing is launched where there is nothing to compute. The backward kernels read ``grad_out`` as they do the
        inputs.
        """
        rows, block, heads, strides = (
            (self.longest[1], "BLOCK_N", self.kv_heads, self.kv_strides)
            if by_key
            else (self.longest[0], "BLOCK_M", self.heads, self.strides)
        )
        tiles = cdiv(rows, blocks[block])
        if tiles * self.batch:
            inputs, blocks = sources(blocks, *self._tiles(blocks, grad_out, by_key))
            launch_kernel(
                kernel,
                (tiles * heads * self.batch * blocks.get("PASSES", 1), 1, 1),
                (
                    *inputs,
                    *tensors,
                    *self.boundaries,
                    *self.longest,
                    tiles,
                    heads,
                    self.heads // self.kv_heads,
                    *strides,
                    *self.numbers,
                ),
                {**flags, **self.constants, **blocks},
            )


def forward(operands: Operands, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.attention.op.attention_forward`."""
    problem = _Problem(operands, settings)
    q = problem.operands.q
    out = contiguous_like(q)
    lse = q.new_empty((*q.shape[:-3], problem.heads, q.shape[-3]), dtype=torch.float32)
    problem.launch(attention_forward_kernel, problem.tile("attention_forward"), out, lse)
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    operands: Operands,
    out: torch.Tensor,
    lse: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.attention.op.attention_backward`."""
    problem = _Problem(operands, settings)
    q, k, v, *_ = problem.operands
    dq, dk = contiguous_like(q), contiguous_like(k)
    dv = k.new_empty(0) if v is None else contiguous_like(k)
    blocks = problem.tile("attention_dq")
    # dK and dV read delta, too: whichever launch computes it comes before theirs.
    in_dq = bool(blocks.get("DELTA"))
    delta = torch.empty_like(lse) if in_dq else _delta(grad_out, out, grad_lse, lse)
    sources_of_delta = (out, grad_lse) if in_dq else (None, None)
    problem.launch(attention_dq_kernel, blocks, *sources_of_delta, lse, delta, dq, grad_out=grad_out)

    blocks = problem.tile("attention_dkdv")
    # Two sums of the largest heads do not fit the registers at once.
    is_split = blocks.pop("SPLIT", 0) and not problem.same_kv
    gradients = (dk, dk if v is None else dv)
    for want_k, want_v in ((True, False), (False, True)) if is_split else ((True, True),):
        problem.launch(
            attention_dkdv_kernel,
            blocks,
            *(lse, delta, *gradients),
            grad_out=grad_out,
            by_key=True,
            WANT_K=want_k,
            WANT_V=want_v,
        )
    return dq, dk, dv


def delta_block(width: int) -> int:
    """Rows of a block of the delta kernel: 4096 elements."""
    return 4096 // width


def _delta(
    grad_out: torch.Tensor, out: torch.Tensor, grad_lse: torch.Tensor | None, lse: torch.Tensor
) -> torch.Tensor:
    """``<grad_out, out> - grad_lse`` of each query and head, like ``lse``."""
    delta = torch.empty_like(lse)
    rows, heads, head_dim = out.shape[-3:]
    batch = out.shape[0] if out.dim() == 4 else 1
    width = next_power_of_2(head_dim)
    block = delta_block(width)
    tiles_q = cdiv(rows, block)
    if tiles_q * batch:
        launch_kernel(
            attention_delta_kernel,
            (tiles_q * heads * batch, 1, 1),
            (grad_out, out, lse if grad_lse is None else grad_lse, delta, rows, heads, tiles_q),
            {"GRAD_LSE": grad_lse is not None, "HEAD_DIM": head_dim, "WIDTH": width, "BLOCK": block},
        )
    return delta
