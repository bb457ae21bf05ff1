"""Native CPU implementation: a few tokens at a time, all their passes while they are in cache.

Beside the result nothing of the size of ``x`` is allocated: float32 copies and the products of the rotation live in
buffers of one chunk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from .arguments import Operands

# Elements of a chunk: 2 MB of float32, so that the three buffers stay in cache and a second thread is worth its start.
_CHUNK_ELEMENTS = 1 << 19

Slices = tuple[slice, slice]


def _chunks(x: torch.Tensor) -> Iterator[Slices]:
    """Slices of batch and tokens of about ``_CHUNK_ELEMENTS``: parts of one batch entry, or several entries whole."""
    batch, tokens, heads, head_dim = x.shape
    at_once = max(_CHUNK_ELEMENTS // max(heads * head_dim, 1), 1)
    entries, length = max(at_once // max(tokens, 1), 1), min(at_once, tokens)
    for first in range(0, batch, entries):
        for start in range(0, tokens, max(length, 1)):
            yield slice(first, first + entries), slice(start, start + length)


def _angles(t: torch.Tensor, chunk: Slices) -> torch.Tensor:
    """A chunk of ``cos`` or ``sin`` ``[B or 1, S, rot]`` as ``[b or 1, s, 1, rot]``."""
    entries, tokens = chunk
    return (t if t.shape[0] == 1 else t[entries])[:, tokens].unsqueeze(2)


class _Buffers:
    """Memory for one chunk at a time; the last one may be smaller."""

    def __init__(self, x: torch.Tensor, dtypes: list[torch.dtype]) -> None:
        most = max(
            (x[chunk].numel() for chunk in _chunks(x)),
            default=0,
        )
        self._flat = [x.new_empty(most, dtype=dtype) for dtype in dtypes]

    def views(self, like: torch.Tensor) -> list[torch.Tensor]:
        return [flat[: like.numel()].view(like.shape) for flat in self._flat]


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scale(x: torch.Tensor, buffer: torch.Tensor, eps: float) -> torch.Tensor:
    """``(mean(x^2) + eps)^-1/2`` of each row, ``[..., 1]``."""
    return torch.mul(x, x, out=buffer).mean(dim=-1, keepdim=True).add_(eps).pow_(-0.5)


def forward(operands: Operands) -> torch.Tensor:
    """See :func:`scattermoe_lora.ops.norm_rotary.op.norm_rotary_forward`."""
    x, weight, cos, sin, eps = operands
    wide = _wide(x)
    out = x.new_empty(x.shape, dtype=operands.out_dtype)
    w = None if weight is None else weight.to(wide)
    buffers = _Buffers(x, [wide, wide, x.dtype, out.dtype])
    for chunk in _chunks(x):
        part, result = x[chunk], out[chunk]
        n, squares, rounded, rotated = buffers.views(part)
        n.copy_(part)
        n.mul_(_scale(n, squares, eps))
        if w is not None:
            n.mul_(w)
        if cos is None or sin is None:
            result.copy_(n)
            continue
        # Rounded before the rotation, and each product before the sum, as in the model's own code.
        n = rounded.copy_(n) if x.dtype != wide else n
        _rotate(n, _angles(cos, chunk), _angles(sin, chunk), result, rotated)
    return out


def _rotate(
    n: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, buffer: torch.Tensor
) -> None:
    """Writes ``n * cos + rotate_half(n) * sin`` to ``out``, and the columns beyond ``cos`` as they are."""
    rotated = cos.shape[-1]
    half = rotated // 2
    torch.mul(n[..., :rotated], cos, out=out[..., :rotated])
    torch.mul(n[..., half:rotated], sin[..., :half], out=buffer[..., :half])
    torch.mul(n[..., :half], sin[..., half:], out=buffer[..., half:rotated])
    out[..., :half].sub_(buffer[..., :half])
    out[..., half:rotated].add_(buffer[..., half:rotated])
    if rotated < n.shape[-1]:
        out[..., rotated:].copy_(n[..., rotated:])


def _rotate_back(
    dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, wide: torch.dtype
) -> None:
    """The gradient of ``n`` in :func:`_rotate`, written to ``out``; ``dy`` is of dtype ``wide``."""
    rotated = cos.shape[-1]
    half = rotated // 2
    cos, sin = cos.to(wide), sin.to(wide)
    torch.mul(dy[..., :rotated], cos, out=out[..., :rotated])
    out[..., :half].addcmul_(dy[..., half:rotated], sin[..., half:])
    out[..., half:rotated].addcmul_(dy[..., :half], sin[..., :half], value=-1)
    if rotated < dy.shape[-1]:
        out[..., rotated:].copy_(dy[..., rotated:])


def backward(dy: torch.Tensor, operands: Operands, names: Collection[str]) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.norm_rotary.op.norm_rotary_backward`."""
    x, weight, cos, sin, eps = operands
    wide, head_dim = _wide(x), x.shape[-1]
    dx = x.new_empty(x.shape) if "x" in names else None
    w = None if weight is None else weight.to(wide)
    dw = x.new_zeros(head_dim, dtype=wide) if "weight" in names else None
    buffers = _Buffers(x, [wide, wide, wide])
    for chunk in _chunks(x):
        part = x[chunk]
        h, g, buffer = buffers.views(part)
        h.copy_(part)
        scale = _scale(h, buffer, eps)
        h.mul_(scale)
        if cos is None or sin is None:
            g.copy_(dy[chunk])
        else:
            buffer.copy_(dy[chunk])
            _rotate_back(buffer, _angles(cos, chunk), _angles(sin, chunk), g, wide)
        rows = torch.mul(g, h, out=buffer).view(-1, head_dim)
        if dw is not None:
            dw.add_(rows.sum(dim=0))
        if dx is not None:
            mean = (rows.sum(dim=1) if w is None else rows @ w).div_(head_dim).view(scale.shape)
            if w is not None:
                g.mul_(w)
            g.addcmul_(h, mean, value=-1)
            dx[chunk].copy_(g.mul_(scale))
    gradients = {} if dx is None else {"x": dx}
    if dw is not None and weight is not None:
        gradients["weight"] = dw.to(weight.dtype)
    return gradients
