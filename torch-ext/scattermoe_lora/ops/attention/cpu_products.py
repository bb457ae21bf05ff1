"""Attention as plain matrix products, for what PyTorch's own flash attention for CPUs does not compute.

A head's scores are in memory whole for the queries of one piece. A row of them is complete, so the softmax needs no
running maximum, and the backward computes the probabilities just as the forward does. Shapes are those of
:mod:`scattermoe_lora.ops.attention.cpu_flash`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..cpu_matmul import multiplies_bfloat16

# Scores of one head and piece: 4 MB of float32. Half of that made the products slower, twice as much the passes.
_MOST_SCORES = 1 << 20
_MOST_ROWS, _FEWEST_ROWS = 192, 16


def rows(group: int, keys: int) -> int:
    """The queries of a piece that sees ``keys`` keys, of ``group`` heads each."""
    return max(_FEWEST_ROWS, min(_MOST_ROWS, _MOST_SCORES // max(1, group * keys)))


def _operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of ``dtype`` are multiplied in."""
    if dtype == torch.bfloat16 and not multiplies_bfloat16():
        return torch.float32
    return torch.float32 if dtype == torch.float16 else dtype


def _exact_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b^T`` in float32 (float64 for float64): of bfloat16 the product, and what rounding took from it.

    oneDNN sums bfloat16 in float32 but rounds what it returns. Where a processor multiplies bfloat16, two products are
    still faster than one in float32.
    """
    rounded = torch.mm(a, b.t())
    if a.dtype != torch.bfloat16:
        return rounded
    rest = torch.addmm(rounded, a, b.t(), alpha=-1)
    # An infinite product has none, and infinity minus itself would make it NaN.
    return rounded.float().sub_(rest.nan_to_num_(0, 0, 0))


def _key_heads(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[int, slice, int]]:
    """Each key head: its place in the batch, the query heads that read it, and its own number."""
    group = q.shape[1] // k.shape[1]
    for row, head in itertools.product(range(k.shape[0]), range(k.shape[1])):
        yield row, slice(head * group, (head + 1) * group), head


def _flat(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[h, n, D]`` as ``[h * n, D]``, contiguous."""
    return x.to(dtype).reshape(-1, x.shape[-1]).contiguous()


def _scores(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores ``[G * n, m]``, and the soft cap's tanh."""
    scores = _exact_product(q, k).mul_(scale)
    tanh = None
    if softcap:
        tanh = scores.div_(softcap).tanh_()
        scores = tanh * softcap
    if mask is not None:
        scores.unflatten(0, (-1, mask.shape[0])).add_(mask)
    return scores, tanh


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, H, n, D]`` and log-sum-exp ``[B, H, n]``; arguments as for the flash attention."""
    dtype = _operand_dtype(q.dtype)
    out, lse = (
        torch.empty_like(q),
        q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32)),
    )
    for row, heads, head in _key_heads(q, k):
        keys, values = k[row, head].to(dtype), v[row, head].to(dtype)
        scores, _ = _scores(_flat(q[row, heads], dtype), keys, mask, scale, softcap)
        highest = scores.amax(dim=-1)
        p = scores.softmax(dim=-1)
        # The largest probability is exp(highest - lse): torch's logsumexp takes far longer than its softmax.
        lse[row, heads] = (highest - p.amax(dim=-1).log_()).view(-1, q.shape[2])
        out[row, heads] = torch.mm(p.to(dtype), values).view(-1, *q.shape[2:])
    return out, lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> torch.Tensor:
    """The gradient of ``q``; those of keys and values are added to ``dk`` and ``dv``, float32 (float64 for float64)."""
    dtype = _operand_dtype(q.dtype)
    dq = torch.empty_like(q)
    for row, heads, head in _key_heads(q, k):
        queries, grads = _flat(q[row, heads], dtype), _flat(grad_out[row, heads], dtype)
        keys, values = k[row, head].to(dtype), v[row, head].to(dtype)
        scores, tanh = _scores(queries, keys, mask, scale, softcap)
        p = scores.softmax(dim=-1)
        dv[row, head] += _exact_product(p.to(dtype).t(), grads.t())
        # <do, out>, summed from the numbers that it is subtracted from: of a single key exactly nothing is left.
        ds = _exact_product(grads, values).mul_(p)
        delta = ds.sum(dim=-1, keepdim=True)
        if grad_lse is not None:
            delta -= grad_lse[row, heads].reshape(-1, 1)
        ds = ds.addcmul_(p, delta, value=-1).mul_(scale)
        if tanh is not None:
            ds.mul_(tanh.square_().neg_().add_(1))
        ds = ds.to(dtype)
        dk[row, head] += _exact_product(ds.t(), queries.t())
        dq[row, heads] = torch.mm(ds, keys).view(-1, *q.shape[2:])
    return dq
