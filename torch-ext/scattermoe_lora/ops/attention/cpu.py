"""Native CPU implementation: a few queries of all heads at a time, against all the keys that they see.

The scores of one block of queries are the only thing that grows with queries times keys, and the block shrinks as the
keys become more. A row of scores is complete, so the softmax needs no running maximum, and forward and backward take
the probabilities from the log-sum-exp in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .geometry import Window

# Scores of one block: 2 MB of float32, to stay in a core's cache between the passes over them.
_BLOCK_SCORES = 1 << 19
# Rows of a block, at most and at least: more do not speed up the products, and fewer are no longer products. 16 rows of
# scores are smaller than the keys.
_MOST_ROWS, _FEWEST_ROWS = 256, 16


class _Sequence(NamedTuple):
    """One sequence: its rows in the tensors of queries and of keys."""

    batch: int
    q: slice
    k: slice

    @property
    def queries(self) -> int:
        return self.q.stop - self.q.start

    @property
    def keys(self) -> int:
        return self.k.stop - self.k.start


def _sequences(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None
) -> list[_Sequence]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return [_Sequence(b, slice(0, q.shape[1]), slice(0, k.shape[1])) for b in range(q.shape[0])]
    qs, ks = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [_Sequence(0, slice(*qs[i : i + 2]), slice(*ks[i : i + 2])) for i in range(len(qs) - 1)]


class _Block(NamedTuple):
    """Queries ``[first, last)`` of a sequence and the keys ``[begin, end)`` that any of them sees."""

    first: int
    last: int
    begin: int
    end: int


def _blocks(sequence: _Sequence, heads: int, window: Window) -> Iterator[_Block]:
    widest = sequence.keys
    if window.left >= 0 and window.right >= 0:
        widest = min(widest, window.left + window.right + _MOST_ROWS)
    rows = max(_FEWEST_ROWS, min(_MOST_ROWS, _BLOCK_SCORES // max(1, heads * widest)))
    for first in range(0, sequence.queries, rows):
        last = min(first + rows, sequence.queries)
        yield _Block(first, last, *window.keys(first, last, sequence.queries, sequence.keys))


def _by_head(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[S, H, D]`` to ``[H, S, D]``, a view where the dtype stays."""
    return x.transpose(0, 1).to(dtype)


def _grouped(x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, Hq, D]`` to ``[Hkv, G * rows, D]``: the queries that share a key head follow each other."""
    rows, heads, head_dim = x.shape
    by_group = x.unflatten(1, (kv_heads, heads // kv_heads)).permute(1, 2, 0, 3)
    return by_group.to(dtype).reshape(kv_heads, heads // kv_heads * rows, head_dim)


def _ungrouped(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``[Hkv, G * rows, D]`` to ``[rows, Hq, D]``."""
    return x.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


class _Scores(NamedTuple):
    """Scores of a block ``[Hkv, G * rows, keys]``, and the tanh of the soft cap where there is one."""

    values: torch.Tensor
    tanh: torch.Tensor | None


def _scores(
    q: torch.Tensor, k: torch.Tensor, block: _Block, shift: int, scale: float, window: Window, softcap: float
) -> _Scores:
    """Scores of grouped queries and the block's keys, -inf where the window hides them."""
    scores = torch.bmm(q, k.mT).mul_(scale)
    tanh = None
    if softcap:
        tanh = scores.div_(softcap).tanh_()
        scores = tanh * softcap
    _hide(scores.unflatten(1, (-1, block.last - block.first)), block, shift, window)
    return _Scores(scores, tanh)


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


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """``exp(scores - lse)`` in place; 0 in a row that sees nothing, whose log-sum-exp is -inf."""
    return scores.sub_(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp_()


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    scale: float,
    window: Window,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.attention.op.attention_forward`."""
    wide, heads, kv_heads = _wide(q), q.shape[-2], k.shape[-2]
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full((*q.shape[:-3], heads, q.shape[-3]), -torch.inf, dtype=wide)
    if q.dim() == 3:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), None if v is None else v.unsqueeze(0)
    outs, lses = out.view(q.shape), lse.view(q.shape[0], heads, q.shape[1])
    for sequence in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        b, shift = sequence.batch, sequence.keys - sequence.queries
        q_seq, out_seq, lse_seq = q[b, sequence.q], outs[b, sequence.q], lses[b, :, sequence.q]
        k_seq = _by_head(k[b, sequence.k], wide)
        v_seq = k_seq if v is None else _by_head(v[b, sequence.k], wide)
        for block in _blocks(sequence, heads, window):
            if block.begin == block.end:
                continue
            rows, keys = slice(block.first, block.last), slice(block.begin, block.end)
            q_block = _grouped(q_seq[rows], kv_heads, wide)
            scores, _ = _scores(q_block, k_seq[:, keys], block, shift, scale, window, softcap)
            lse_block = scores.logsumexp(dim=-1)
            o_block = torch.bmm(_probabilities(scores, lse_block), v_seq[:, keys])
            out_seq[rows] = _ungrouped(o_block, block.last - block.first)
            lse_seq[:, rows] = lse_block.view(heads, -1)
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: Window,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.attention.op.attention_backward`."""
    wide, heads, kv_heads = _wide(q), q.shape[-2], k.shape[-2]
    dq, dk = torch.zeros(q.shape, dtype=q.dtype), torch.zeros(k.shape, dtype=k.dtype)
    dv = torch.zeros((0,) if v is None else v.shape, dtype=k.dtype)
    if q.dim() == 3:
        grad_out, q, k, out = grad_out.unsqueeze(0), q.unsqueeze(0), k.unsqueeze(0), out.unsqueeze(0)
        v = None if v is None else v.unsqueeze(0)
        lse, grad_lse = lse.unsqueeze(0), None if grad_lse is None else grad_lse.unsqueeze(0)
    dqs, dks = dq.view(q.shape), dk.view(k.shape)
    dvs = dks if v is None else dv.view(v.shape)
    for sequence in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        b, shift = sequence.batch, sequence.keys - sequence.queries
        q_seq, out_seq, do_seq = q[b, sequence.q], out[b, sequence.q], grad_out[b, sequence.q]
        dq_seq, lse_seq = dqs[b, sequence.q], lse[b, :, sequence.q]
        k_seq = _by_head(k[b, sequence.k], wide)
        v_seq = k_seq if v is None else _by_head(v[b, sequence.k], wide)
        dk_seq = torch.zeros(k_seq.shape, dtype=wide)
        dv_seq = dk_seq if v is None else torch.zeros_like(dk_seq)
        for block in _blocks(sequence, heads, window):
            if block.begin == block.end:
                continue
            rows, keys = slice(block.first, block.last), slice(block.begin, block.end)
            q_block, do = (_grouped(x[rows], kv_heads, wide) for x in (q_seq, do_seq))
            scores, tanh = _scores(q_block, k_seq[:, keys], block, shift, scale, window, softcap)
            p = _probabilities(scores, lse_seq[:, rows].reshape(kv_heads, -1))
            delta = (do * _grouped(out_seq[rows], kv_heads, wide)).sum(dim=-1)
            if grad_lse is not None:
                delta -= grad_lse[b, :, sequence.q][:, rows].reshape(kv_heads, -1)
            dv_seq[:, keys].baddbmm_(p.mT, do)
            ds = torch.bmm(do, v_seq[:, keys].mT).sub_(delta.unsqueeze(-1)).mul_(p).mul_(scale)
            if tanh is not None:
                ds.mul_(tanh.square_().neg_().add_(1))
            dk_seq[:, keys].baddbmm_(ds.mT, q_block)
            dq_seq[rows] = _ungrouped(torch.bmm(ds, k_seq[:, keys]), block.last - block.first)
        dks[b, sequence.k] = dk_seq.transpose(0, 1)
        if v is not None:
            dvs[b, sequence.k] = dv_seq.transpose(0, 1)
    return dq, dk, dv
