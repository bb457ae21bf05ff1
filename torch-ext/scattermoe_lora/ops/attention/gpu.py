"""Triton implementation: launches of the attention kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ..grouped_linear.gpu import float32_precision
from . import tiles
from .kernels import attention_delta_kernel, attention_forward_kernel
from .kernels_backward import attention_dkdv_kernel, attention_dq_kernel
from .window import Window

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


class _Problem:
    """What all launches of one call have in common."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
        longest: tuple[int, int],
        scale: float,
        window: Window,
        softcap: float,
    ) -> None:
        self.is_packed = cu_seqlens_q is not None and cu_seqlens_k is not None
        self.batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        self.heads, self.head_dim = q.shape[-2:]
        self.kv_heads = k.shape[-2]
        self.longest_q, self.longest_k = longest
        self.same_kv = v is None
        self.like = q
        # A packed batch is told apart by cu_seqlens alone.
        self.batch_stride = 0 if self.is_packed else q.shape[1] * self.heads * self.head_dim
        self.kv_batch_stride = 0 if self.is_packed else k.shape[1] * self.kv_heads * self.head_dim
        self.strides = [s for x in (q, k, k if v is None else v) for s in _strides(x)]
        self.lse_strides = (
            0 if self.is_packed else self.heads * q.shape[1],
            q.shape[-3],
        )
        # Unused pointers still have to be pointers.
        self.boundaries = (
            (cu_seqlens_q, cu_seqlens_k) if cu_seqlens_q is not None and cu_seqlens_k is not None else (q, q)
        )
        self.numbers = (scale, softcap or 1.0, *window)
        self.constants: dict[str, Any] = {
            "VARLEN": self.is_packed,
            "SAME_KV": self.same_kv,
            "SOFTCAP": softcap != 0,
            "LEFT": window.left >= 0,
            "RIGHT": window.right >= 0,
            "PRECISION": float32_precision(q),
            "HEAD_DIM": self.head_dim,
            "WIDTH": triton.next_power_of_2(self.head_dim),
        }

    def launch(self, kernel: str) -> dict[str, int]:
        """Block sizes and options; a head that is smaller than a chunk is one."""
        found = dict(tiles.launch(kernel, self.like, self.head_dim, self.same_kv))
        found["CHUNK"] = min(found["CHUNK"], self.constants["WIDTH"])
        return found


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    longest: tuple[int, int],
    scale: float,
    window: Window,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.attention.op.attention_forward`; ``longest`` are the two longest lengths."""
    q, k, v = _readable(q), _readable(k), None if v is None else _readable(v)
    of = _Problem(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, scale, window, softcap)
    out = q.new_empty(q.shape)
    lse = q.new_empty((*q.shape[:-3], of.heads, q.shape[-3]), dtype=torch.float32)
    launch = of.launch("forward")
    tiles_q = triton.cdiv(of.longest_q, launch["BLOCK_M"])
    if tiles_q * of.batch == 0:
        return out, lse
    attention_forward_kernel[(tiles_q * of.heads * of.batch,)](
        q,
        k,
        k if v is None else v,
        out,
        lse,
        *of.boundaries,
        of.longest_q,
        of.longest_k,
        tiles_q,
        of.heads,
        of.heads // of.kv_heads,
        *of.strides,
        of.batch_stride,
        *of.lse_strides,
        *of.numbers,
        **of.constants,
        **launch,
    )
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
    longest: tuple[int, int],
    scale: float,
    window: Window,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.attention.op.attention_backward`."""
    q, k, v = _readable(q), _readable(k), None if v is None else _readable(v)
    of = _Problem(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, scale, window, softcap)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dv = k.new_empty((0,) if v is None else k.shape)
    delta = _delta(grad_out, out, grad_lse, lse)
    shared = (q, k, k if v is None else v, grad_out, lse, delta)

    launch = of.launch("dq")
    tiles_q = triton.cdiv(of.longest_q, launch["BLOCK_M"])
    if tiles_q * of.batch:
        attention_dq_kernel[(tiles_q * of.heads * of.batch,)](
            *shared,
            dq,
            *of.boundaries,
            of.longest_q,
            of.longest_k,
            tiles_q,
            of.heads,
            of.heads // of.kv_heads,
            *of.strides,
            of.batch_stride,
            *of.lse_strides,
            *of.numbers,
            **of.constants,
            **launch,
        )

    launch = of.launch("dkdv")
    # Two sums of the largest heads do not fit the registers at once.
    is_split = launch.pop("SPLIT") and not of.same_kv
    tiles_k = triton.cdiv(of.longest_k, launch["BLOCK_N"])
    for want_k, want_v in ((True, False), (False, True)) if is_split else ((True, True),):
        if tiles_k * of.batch:
            attention_dkdv_kernel[(tiles_k * of.kv_heads * of.batch,)](
                *shared,
                dk,
                dk if v is None else dv,
                *of.boundaries,
                of.longest_q,
                of.longest_k,
                tiles_k,
                of.kv_heads,
                of.heads // of.kv_heads,
                *of.strides,
                of.batch_stride,
                of.kv_batch_stride,
                *of.lse_strides,
                *of.numbers,
                WANT_K=want_k,
                WANT_V=want_v,
                **of.constants,
                **launch,
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
    width = triton.next_power_of_2(head_dim)
    block = delta_block(width)
    tiles_q = triton.cdiv(rows, block)
    if tiles_q * batch:
        attention_delta_kernel[(tiles_q * heads * batch,)](
            grad_out,
            out,
            lse if grad_lse is None else grad_lse,
            delta,
            rows,
            heads,
            tiles_q,
            GRAD_LSE=grad_lse is not None,
            HEAD_DIM=head_dim,
            WIDTH=width,
            BLOCK=block,
        )
    return delta
