"""Attention of one sequence, or of equal ones in a batch, by PyTorch's own flash attention for CPUs.

That kernel knows no mask but "causal" from the top left corner and a dense one. A sequence that is causal or sees
everything goes to it whole; of any other some queries at a time, with the keys that any of them sees and a mask of that
size. What it has no arithmetic for is computed by plain products, on pieces of the same kind.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import cpu_flash, cpu_products
from .arguments import Settings
from .window import Window

# Queries of a masked piece. More of them share the keys at its edges, which some see in vain; the kernel takes 64 at a
# time of 192 and more, and 32 of less. Of 128, 192, 256 and 512, with windows of 128 to 1024 keys, 192 was the
# fastest or within a tenth of it.
_ROWS = 192


class _Piece(NamedTuple):
    """Queries, the keys that any of them sees, and the mask ``[n, m]`` added to the scores, if one does not see all."""

    queries: slice
    keys: slice
    mask: torch.Tensor | None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, n, H, D]`` and log-sum-exp ``[B, H, n]``, of keys and values ``[B, m, Hkv, D]``."""
    takes_whole = is_whole(q, k, settings)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    window = settings.window.within(q.shape[2], k.shape[2])
    is_plain = _is_plain(k.shape[2], window, settings)
    if takes_whole:
        out, lse = cpu_flash.forward(q, k, v, None, window.right == 0, settings.scale)
        return out.transpose(1, 2), lse.contiguous()
    out = _zeros_by_rows(q, q.dtype)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=_wide(q.dtype))
    for piece in _pieces(q, k, window, is_plain):
        at_q, at_k = piece.queries, piece.keys
        tensors = (q[:, :, at_q], k[:, :, at_k], v[:, :, at_k])
        if is_plain:
            results = cpu_products.forward(*tensors, piece.mask, settings.scale, settings.softcap)
        else:
            results = cpu_flash.forward(*tensors, piece.mask, False, settings.scale)
        out[:, :, at_q], lse[:, :, at_q] = results
    return out.transpose(1, 2), lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``dq``, and ``dk`` and ``dv``, which are in float32 where they are sums over pieces."""
    takes_whole = is_whole(q, k, settings)
    grad_out, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, q, k, v, out))
    window = settings.window.within(q.shape[2], k.shape[2])
    is_plain = _is_plain(k.shape[2], window, settings)
    if takes_whole:
        is_causal = window.right == 0
        dq, dk, dv = cpu_flash.backward(
            grad_out, grad_lse, q, k, v, out, lse, None, is_causal, settings.scale
        )
    else:
        dq, dk, dv = _zeros_by_rows(q, q.dtype), _zeros_by_rows(k, lse.dtype), _zeros_by_rows(k, lse.dtype)
        for piece in _pieces(q, k, window, is_plain):
            at_q, at_k = piece.queries, piece.keys
            grad, of_lse = grad_out[:, :, at_q], None if grad_lse is None else grad_lse[:, :, at_q]
            tensors = (q[:, :, at_q], k[:, :, at_k], v[:, :, at_k])
            if is_plain:
                dq[:, :, at_q] = cpu_products.backward(
                    grad,
                    of_lse,
                    *tensors,
                    piece.mask,
                    settings.scale,
                    settings.softcap,
                    dk[:, :, at_k],
                    dv[:, :, at_k],
                )
                continue
            results = (out[:, :, at_q], lse[:, :, at_q])
            parts = cpu_flash.backward(grad, of_lse, *tensors, *results, piece.mask, False, settings.scale)
            dq[:, :, at_q] = parts[0]
            dk[:, :, at_k] += parts[1]
            dv[:, :, at_k] += parts[2]
    if grad_lse is None:
        clear_lone(dq, window, k.shape[2])
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _zeros_by_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in the shape ``[B, H, n, D]`` of ``x``, rows before heads in memory."""
    return x.new_zeros(x.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


def _is_plain(keys: int, window: Window, settings: Settings) -> bool:
    """Tell whether plain products compute the sequence."""
    # Of a single key they leave exactly no gradient of the score; the kernel leaves what rounding does.
    return bool(settings.softcap) or keys == 1 or window == (0, 0)


def is_whole(q: torch.Tensor, k: torch.Tensor, settings: Settings) -> bool:
    """Tell whether the kernel takes the sequences whole: queries ``[B, n, H, D]`` and keys ``[B, m, Hkv, D]``."""
    queries, keys = q.shape[1], k.shape[1]
    window = settings.window.within(queries, keys)
    is_known = window == (-1, -1) or (window == (-1, 0) and queries == keys)
    return is_known and bool(q.numel() and k.numel()) and not _is_plain(keys, window, settings)


def _first_seeing(window: Window, queries: int, keys: int) -> int:
    """The first query that sees a key: where there are more queries than keys, those before may see nothing."""
    return max(0, queries - keys - window.right) if window.right >= 0 else 0


def clear_lone(dq: torch.Tensor, window: Window, keys: int) -> None:
    """Takes what rounding left in the gradient of a first query that sees one key, whose probability is always 1.

    What is not finite becomes NaN.
    """
    queries = dq.shape[2]
    first = _first_seeing(window, queries, keys)
    begin, end = window.keys(first, first + 1, queries, keys)
    if end - begin == 1 and first < queries:
        dq.select(2, first).mul_(0)


def _pieces(q: torch.Tensor, k: torch.Tensor, window: Window, is_plain: bool) -> list[_Piece]:
    """The queries that see any key, some at a time, first to last."""
    queries, keys = q.shape[2], k.shape[2]
    if not keys:
        return []
    shift = keys - queries
    rows = cpu_products.rows(q.shape[1] // k.shape[1], keys) if is_plain else _ROWS
    spans = []
    for first in range(_first_seeing(window, queries, keys), queries, rows):
        last = min(first + rows, queries)
        spans.append((first, last, *window.keys(first, last, queries, keys)))
    # Counted from the key that a piece's first query stands at, each mask is a part of one band.
    lowest = min((begin - first - shift for first, _, begin, _ in spans), default=0)
    highest = max((end - first - shift for first, _, _, end in spans), default=0)
    distance = torch.arange(lowest, highest) - torch.arange(min(rows, queries))[:, None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if window.left >= 0:
        hidden |= distance < -window.left
    if window.right >= 0:
        hidden |= distance > window.right
    band = q.new_zeros(distance.shape).masked_fill_(hidden, -torch.inf)
    pieces = []
    for first, last, begin, end in spans:
        start = begin - first - shift - lowest
        seen_by_last, _ = window.keys(last - 1, last, queries, keys)
        _, seen_by_first = window.keys(first, first + 1, queries, keys)
        mask = band[: last - first, start : start + end - begin]
        sees_all = seen_by_last <= begin and end <= seen_by_first
        pieces.append(_Piece(slice(first, last), slice(begin, end), None if sees_all else mask))
    return pieces
