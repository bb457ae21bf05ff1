"""Native CPU implementation: a few rows at a time, all their passes while they are in cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from .arguments import Operands

# Elements of a chunk: 2 MB of float32, so that its passes meet it in cache.
_CHUNK_ELEMENTS = 1 << 19


def _chunks(*tensors: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """The same rows ``[m, H]`` of each of the tensors ``[*, H]`` that are there, ``_CHUNK_ELEMENTS`` at a time."""
    rows = [t.reshape(-1, t.shape[-1]) for t in tensors if t is not None and t.numel()]
    if not rows:
        return
    count = max(_CHUNK_ELEMENTS // rows[0].shape[1], 1)
    if rows[0].shape[0] <= count:
        yield rows
    else:
        yield from map(list, zip(*(t.split(count) for t in rows), strict=True))


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _normalise(rows: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows over their root mean square, of the wide dtype, and what they were multiplied by, ``[m, 1]``."""
    n = rows.to(_wide(rows), copy=True)
    scale = (n * n).mean(dim=-1, keepdim=True).add_(eps).pow_(-0.5)
    return n.mul_(scale), scale


def forward(operands: Operands, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.rms_norm.op.rms_norm_forward`."""
    x, weight, eps, offset, round_first = operands
    out = x.new_empty(x.shape, dtype=operands.out_dtype)
    total = x.new_empty(x.shape if residual is not None else 0)
    w = None
    if weight is not None:
        w = (weight if round_first else weight.to(_wide(x))) + offset if offset else weight
    for rows, result, *sums in _chunks(x, out, residual, total):
        if sums:
            rows = torch.add(rows, sums[0], out=sums[1])
        n, _ = _normalise(rows, eps)
        if w is None:
            result.copy_(n)
        elif round_first:
            torch.mul(n.to(x.dtype), w, out=result)
        else:
            result.copy_(n.mul_(w))
    return out, total


def backward(
    dy: torch.Tensor, d_total: torch.Tensor | None, operands: Operands, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.rms_norm.op.rms_norm_backward`."""
    x, weight, eps, offset, _ = operands
    wide, size = _wide(x), x.shape[-1]
    gradients: dict[str, torch.Tensor] = {}
    w = None if weight is None else weight.to(wide) + offset
    dw = x.new_zeros(size, dtype=wide)
    dx = x.new_empty(x.shape)
    for rows, grad, result, *extra in _chunks(x, dy, dx, d_total):
        h, scale = _normalise(rows, eps)
        g = grad.to(wide, copy=True)
        products = g * h
        if "weight" in names:
            dw.add_(products.sum(dim=0))
        if "x" in names:
            mean = (products.sum(dim=1) if w is None else products @ w).div_(size).unsqueeze(1)
            if w is not None:
                g.mul_(w)
            g.addcmul_(h, mean, value=-1).mul_(scale)
            result.copy_(g.add_(extra[0]) if extra else g)
    if "x" in names:
        gradients["x"] = dx
    if "weight" in names and weight is not None:
        gradients["weight"] = dw.to(weight.dtype)
    return gradients
