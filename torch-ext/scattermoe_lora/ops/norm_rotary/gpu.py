"""Triton implementation: one pass over the rows forward, one backward."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import triton

from .arguments import Operands
from .kernels import rotary_backward_kernel, rotary_forward_kernel

# Elements of a block: 16 of x for each of 128 threads, two loads of 16 bytes in bfloat16. The backward then keeps its
# values in few enough registers for several blocks to share a multiprocessor. Reasoned, not timed.
_BLOCK_ELEMENTS = 2048
# Programs that sum the weight's gradient, each into a row of its own: a fixed number, so that the order of the sums,
# and with it every bit of the result, is the same on every device.
_SUMMING_PROGRAMS = 2048

OPTIONS = {"num_warps": 4}


def _refuse_float64(x: torch.Tensor) -> None:
    if x.dtype == torch.float64:
        raise NotImplementedError(
            "rms_norm_rotary: x: float64 runs on the CPU only; use float32 on this device"
        )


def sizes_of(head_dim: int, rotated: int) -> dict[str, int]:
    """The sizes that ``head_dim`` and the number of rotated columns give a kernel, as its constants."""
    half, rest = rotated // 2, head_dim - rotated
    # Triton has no empty range: a part without columns has a width, and no code.
    widths = [triton.next_power_of_2(max(length, 1)) for length in (half, rest)]
    across = 2 * widths[0] * (half > 0) + widths[1] * (rest > 0)
    return {
        "HALF": half,
        "REST": rest,
        "HALF_WIDTH": widths[0],
        "REST_WIDTH": widths[1],
        "BLOCK": triton.next_power_of_2(_BLOCK_ELEMENTS // across // 2 + 1),
    }


def _strides(t: torch.Tensor | None, batch: int) -> tuple[int, int]:
    """Strides of batch and token of ``cos`` or ``sin``; one batch entry serves all."""
    if t is None:
        return 0, 0
    return (t.stride(0) if batch > 1 and t.shape[0] > 1 else 0), t.stride(1)


def _rows_in_place(t: torch.Tensor | None) -> torch.Tensor | None:
    """``t`` with its last dimension contiguous, as the kernels read it: itself wherever it is so."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def forward(operands: Operands) -> torch.Tensor:
    """See :func:`scattermoe_lora.ops.norm_rotary.op.norm_rotary_forward`."""
    x, weight, cos, sin, eps = operands
    _refuse_float64(x)
    batch, tokens, heads, head_dim = x.shape
    out = x.new_empty(x.shape, dtype=operands.out_dtype)
    if not x.numel():
        return out
    x_rows, cos, sin = _rows_in_place(x), _rows_in_place(cos), _rows_in_place(sin)
    assert x_rows is not None
    sizes = sizes_of(head_dim, 0 if cos is None else cos.shape[-1])
    blocks = triton.cdiv(tokens * heads, sizes["BLOCK"])
    rotary_forward_kernel[(batch * blocks,)](
        x_rows,
        None if weight is None else weight.contiguous(),
        cos,
        sin,
        out,
        tokens * heads,
        blocks,
        eps,
        *x_rows.stride()[:3],
        *_strides(cos, batch),
        *_strides(sin, batch),
        HEADS=heads,
        WEIGHTED=weight is not None,
        **sizes,
        **OPTIONS,
    )
    return out


def backward(dy: torch.Tensor, operands: Operands, names: Collection[str]) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.norm_rotary.op.norm_rotary_backward`."""
    x, weight, cos, sin, eps = operands
    _refuse_float64(x)
    batch, tokens, heads, head_dim = x.shape
    summed = weight if "weight" in names else None
    dx = x.new_empty(x.shape) if "x" in names else None
    gradients = {} if dx is None else {"x": dx}
    if not x.numel():
        if summed is not None:
            gradients["weight"] = torch.zeros_like(summed)
        return gradients
    dy_rows, x_rows, cos, sin = (_rows_in_place(t) for t in (dy, x, cos, sin))
    assert dy_rows is not None
    assert x_rows is not None
    sizes = sizes_of(head_dim, 0 if cos is None else cos.shape[-1])
    blocks = triton.cdiv(tokens * heads, sizes["BLOCK"])
    programs = min(batch * blocks, _SUMMING_PROGRAMS) if summed is not None else batch * blocks
    sums: Any = x.new_empty((programs, head_dim), dtype=torch.float32) if summed is not None else None
    rotary_backward_kernel[(programs,)](
        dy_rows,
        x_rows,
        None if weight is None else weight.contiguous(),
        cos,
        sin,
        dx,
        sums,
        tokens * heads,
        blocks,
        batch * blocks,
        eps,
        *dy_rows.stride()[:3],
        *x_rows.stride()[:3],
        *_strides(cos, batch),
        *_strides(sin, batch),
        HEADS=heads,
        WEIGHTED=weight is not None,
        NEED_X=dx is not None,
        NEED_WEIGHT=summed is not None,
        **sizes,
        **OPTIONS,
    )
    if summed is not None:
        gradients["weight"] = sums.sum(dim=0).to(summed.dtype)
    return gradients
