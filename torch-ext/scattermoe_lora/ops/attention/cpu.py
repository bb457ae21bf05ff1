"""Native CPU implementation: a few queries at a time, against all the keys that they see.

The scores of one block of queries are the only thing that grows with queries times keys, and the block shrinks as the
keys become more. A row of scores is complete, so the softmax needs no running maximum, and the backward computes the
probabilities just as the forward does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .arguments import Operands, Settings
from .cpu_matmul import REGULAR, exact_matmul_transposed, matmul_transposed, operand_dtype
from .window import Window

# Scores of one block: 4 MB of float32. Half of that made the products slower, twice as much the passes in between.
_BLOCK_SCORES = 1 << 20
# Rows of a block, at most and at least: more do not speed up the products, and fewer are no longer products. 16 rows of
# scores are smaller than the keys.
_MOST_ROWS, _FEWEST_ROWS = 256, 16


class _Part(NamedTuple):
    """Key heads ``heads`` of one sequence: its rows in the tensors of queries and of keys, and the size of a block."""

    batch: int
    q: slice
    k: slice
    heads: slice
    rows: int

    @property
    def queries(self) -> int:
        return int(self.q.stop - self.q.start)

    @property
    def keys(self) -> int:
        return int(self.k.stop - self.k.start)


class _Block(NamedTuple):
    """Queries ``[first, last)`` of a sequence and the keys ``[begin, end)`` that any of them sees."""

    first: int
    last: int
    begin: int
    end: int


def _batched(operands: Operands) -> Operands:
    """The operands with a batch of one where sequences are packed."""
    if operands.q.dim() == 4:
        return operands
    q, k, v, *boundaries = operands
    return Operands(q.unsqueeze(0), k.unsqueeze(0), None if v is None else v.unsqueeze(0), *boundaries)


def _parts(operands: Operands, window: Window) -> Iterator[_Part]:
    """Sequences, and of each as many key heads as fill a block: one of a long sequence, all of a short one."""
    q, k, *_ = operands
    kv_heads = k.shape[2]
    group = q.shape[2] // kv_heads
    if operands.boundaries is None:
        whole = (slice(0, q.shape[1]), slice(0, k.shape[1]))
        sequences = [(b, *whole) for b in range(q.shape[0])]
    else:
        qs, ks = (boundaries.tolist() for boundaries in operands.boundaries)
        sequences = [(0, slice(*qs[i : i + 2]), slice(*ks[i : i + 2])) for i in range(len(qs) - 1)]
    for batch, q_rows, k_rows in sequences:
        keys = k_rows.stop - k_rows.start
        if window.left >= 0 and window.right >= 0:
            keys = min(keys, window.left + window.right + _MOST_ROWS)
        rows = max(_FEWEST_ROWS, min(_MOST_ROWS, _BLOCK_SCORES // max(1, group * keys)))
        filled = group * keys * min(rows, q_rows.stop - q_rows.start)
        at_once = max(1, min(kv_heads, _BLOCK_SCORES // max(1, filled)))
        for head in range(0, kv_heads, at_once):
            yield _Part(batch, q_rows, k_rows, slice(head, min(head + at_once, kv_heads)), rows)


def _blocks(part: _Part, window: Window) -> Iterator[_Block]:
    """Blocks of queries that see a key, first to last."""
    # Where there are more queries than keys, the first ones see nothing.
    blind = max(0, part.queries - part.keys - window.right) if window.right >= 0 else 0
    if part.keys:
        for first in range(blind, part.queries, part.rows):
            last = min(first + part.rows, part.queries)
            begin, end = window.keys(first, last, part.queries, part.keys)
            # A few keys more, which the window hides, make products of the sizes that are fast.
            begin -= begin % REGULAR
            end = min(part.keys, end + -end % REGULAR) if window.right >= 0 else end
            yield _Block(first, last, begin, end)


def _keys(x: torch.Tensor, part: _Part) -> torch.Tensor:
    """The part's rows ``[Hkv, Sk, D]`` of keys or values, each head's contiguous."""
    rows = x[part.batch, part.k, part.heads].transpose(0, 1)
    return rows.to(operand_dtype(x.dtype)).contiguous()


def _queries(x: torch.Tensor, part: _Part, block: _Block, kv_heads: int) -> torch.Tensor:
    """The block's rows ``[Hkv, G * rows, D]``, contiguous: the queries that share a key head follow each other."""
    rows = x[part.batch, part.q][block.first : block.last].unflatten(1, (kv_heads, -1))[:, part.heads]
    return rows.to(operand_dtype(x.dtype)).permute(1, 2, 0, 3).flatten(1, 2).contiguous()


def _put_queries(x: torch.Tensor, part: _Part, block: _Block, kv_heads: int, rows: torch.Tensor) -> None:
    """The reverse of :func:`_queries`."""
    at = x[part.batch, part.q][block.first : block.last].unflatten(1, (kv_heads, -1))[:, part.heads]
    at.copy_(rows.unflatten(1, (-1, block.last - block.first)).permute(2, 0, 1, 3))


def _scores(
    q: torch.Tensor, k: torch.Tensor, part: _Part, block: _Block, settings: Settings, window: Window
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores of grouped queries and the block's keys, -inf where the window hides them; and the soft cap's tanh."""
    scores = exact_matmul_transposed(q, k).mul_(settings.scale)
    tanh = None
    if settings.softcap:
        tanh = scores.div_(settings.softcap).tanh_()
        scores = tanh * settings.softcap
    _hide(scores.unflatten(1, (-1, block.last - block.first)), block, part.keys - part.queries, window)
    return scores, tanh


def _hide(scores: torch.Tensor, block: _Block, shift: int, window: Window) -> None:
    """Sets what the window hides in ``[..., rows, keys]`` to -inf: keys between its edge for the first row and for the
    last, at either side."""
    diagonal = torch.arange(block.first, block.last)[:, None] + shift
    if window.left >= 0:
        end = min(block.end, block.last - 1 + shift - window.left)
        if end > block.begin:
            key = torch.arange(block.begin, end)
            edge = scores[..., : end - block.begin]
            edge.masked_fill_(key < diagonal - window.left, -torch.inf)
    if window.right >= 0:
        begin = max(block.begin, block.first + shift + window.right + 1)
        if begin < block.end:
            key = torch.arange(begin, block.end)
            edge = scores[..., begin - block.begin :]
            edge.masked_fill_(key > diagonal + window.right, -torch.inf)


def forward(operands: Operands, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.attention.op.attention_forward`."""
    q, window = operands.q, settings.window
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    *batch, rows, heads, _ = q.shape
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full((*batch, heads, rows), -torch.inf, dtype=wide)
    operands = _batched(operands)
    q, k, v, *_ = operands
    kv_heads = k.shape[2]
    outs, lses = out.view(q.shape), lse.view(q.shape[0], kv_heads, heads // kv_heads, rows)
    for part in _parts(operands, window):
        k_part = _keys(k, part)
        v_part = k_part if v is None else _keys(v, part)
        lse_part = lses[part.batch, part.heads, :, part.q]
        for block in _blocks(part, window):
            keys = slice(block.begin, block.end)
            q_block = _queries(q, part, block, kv_heads)
            scores, _ = _scores(q_block, k_part[:, keys], part, block, settings, window)
            highest = scores.amax(dim=-1)
            p = scores.softmax(dim=-1)
            # The largest probability is exp(highest - lse): torch's logsumexp takes 15 times as long as its softmax.
            lse_block = highest - p.amax(dim=-1).log_()
            lse_part[..., block.first : block.last] = lse_block.view(*lse_part.shape[:2], -1)
            o_block = matmul_transposed(p.to(k_part.dtype), v_part[:, keys].mT)
            _put_queries(outs, part, block, kv_heads, o_block)
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
    window = settings.window
    dq, dk = (torch.zeros(x.shape, dtype=x.dtype) for x in operands[:2])
    dv = torch.zeros((0,) if operands.v is None else operands.v.shape, dtype=dk.dtype)
    if operands.q.dim() == 3:
        grad_out = grad_out.unsqueeze(0)
    operands = _batched(operands)
    q, k, v, *_ = operands
    heads, kv_heads = q.shape[2], k.shape[2]
    dqs, dks = dq.view(q.shape), dk.view(k.shape)
    dvs = None if v is None else dv.view(v.shape)
    grad_lses = None
    if grad_lse is not None:
        grad_lses = grad_lse.view(q.shape[0], kv_heads, heads // kv_heads, q.shape[1])
    for part in _parts(operands, window):
        k_part = _keys(k, part)
        v_part = k_part if v is None else _keys(v, part)
        dk_part = torch.zeros(k_part.shape, dtype=lse.dtype)
        dv_part = dk_part if v is None else torch.zeros_like(dk_part)
        blocks = list(_blocks(part, window))
        # Of one block the product is the sum; of several, rounding each to bfloat16 would show in the sum.
        matmul_to_sum = matmul_transposed if len(blocks) == 1 else exact_matmul_transposed
        for block in blocks:
            keys = slice(block.begin, block.end)
            q_block, do = (_queries(x, part, block, kv_heads) for x in (q, grad_out))
            scores, tanh = _scores(q_block, k_part[:, keys], part, block, settings, window)
            p = scores.softmax(dim=-1)
            dv_part[:, keys] += matmul_to_sum(p.to(do.dtype).mT, do.mT)
            # <do, out>, summed from the numbers that it is subtracted from: of a single key exactly nothing is left.
            ds = exact_matmul_transposed(do, v_part[:, keys]).mul_(p)
            delta = ds.sum(dim=-1, keepdim=True)
            if grad_lses is not None:
                at = grad_lses[part.batch, part.heads, :, part.q]
                delta -= at[..., block.first : block.last].flatten(1).unsqueeze(-1)
            ds = ds.addcmul_(p, delta, value=-1).mul_(settings.scale)
            if tanh is not None:
                ds.mul_(tanh.square_().neg_().add_(1))
            ds = ds.to(do.dtype)
            dk_part[:, keys] += matmul_to_sum(ds.mT, q_block.mT)
            _put_queries(dqs, part, block, kv_heads, matmul_transposed(ds, k_part[:, keys].mT))
        dks[part.batch, part.k, part.heads] = dk_part.transpose(0, 1)
        if dvs is not None:
            dvs[part.batch, part.k, part.heads] = dv_part.transpose(0, 1)
    return dq, dk, dv
