"""Triton implementation: one pass over the rows forward, one backward."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import triton

from .arguments import Operands
from .kernels import rms_backward_kernel, rms_forward_kernel

# Programs that sum the weight's gradient, each into a row of its own: a fixed number, so that the order of the sums,
# and with it every bit of the result, is the same on every device.
_SUMMING_PROGRAMS = 1024
# Elements that a program holds at a time, if a row is not longer.
_ELEMENTS = 2048


def constants_of(size: int) -> dict[str, int]:
    """Rows at a time, their width and ``num_warps`` for rows of ``size``."""
    width = triton.next_power_of_2(size)
    rows = max(_ELEMENTS // width, 1)
    return {"ROWS": rows, "WIDTH": width, "num_warps": min(max(rows * width // 1024, 4), 16)}


def _rows(t: torch.Tensor | None) -> torch.Tensor | None:
    """``t`` ``[*, H]`` as rows that are each contiguous."""
    if t is None:
        return None
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _stride(rows: torch.Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _check(x: torch.Tensor) -> None:
    if x.dtype == torch.float64:
        raise NotImplementedError("rms_norm: x: float64 runs on the CPU only; use float32 on this device")


def forward(operands: Operands, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.rms_norm.op.rms_norm_forward`."""
    x, weight, eps, offset, round_first = operands
    _check(x)
    size = x.shape[-1]
    out = x.new_empty(x.shape, dtype=operands.out_dtype)
    total = x.new_empty(x.shape if residual is not None else 0)
    if not x.numel():
        return out, total
    constants = constants_of(size)
    rows, residual_rows = _rows(x), _rows(residual)
    assert rows is not None
    count = rows.shape[0]
    rms_forward_kernel[(triton.cdiv(count, constants["ROWS"]),)](
        rows,
        residual_rows,
        None if weight is None else weight.contiguous(),
        out,
        total,
        count,
        size,
        eps,
        offset,
        rows.stride(0),
        _stride(residual_rows),
        ADD=residual is not None,
        WEIGHTED=weight is not None,
        ROUND_FIRST=round_first,
        **constants,
    )
    return out, total


def backward(
    dy: torch.Tensor, d_total: torch.Tensor | None, operands: Operands, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.rms_norm.op.rms_norm_backward`."""
    x, weight, eps, offset, _ = operands
    _check(x)
    size = x.shape[-1]
    summed = weight if "weight" in names else None
    dx = x.new_empty(x.shape) if "x" in names else None
    gradients = {} if dx is None else {"x": dx}
    if not x.numel():
        if summed is not None:
            gradients["weight"] = torch.zeros_like(summed)
        return gradients
    constants = constants_of(size)
    rows, dy_rows, total_rows = _rows(x), _rows(dy), _rows(d_total)
    assert rows is not None
    count = rows.shape[0]
    blocks = triton.cdiv(count, constants["ROWS"])
    programs = blocks if summed is None else min(blocks, _SUMMING_PROGRAMS)
    sums: Any = x.new_empty((programs, size), dtype=torch.float32) if summed is not None else None
    rms_backward_kernel[(programs,)](
        dy_rows,
        total_rows,
        rows,
        None if weight is None else weight.contiguous(),
        dx,
        sums,
        count,
        blocks,
        size,
        eps,
        offset,
        _stride(dy_rows),
        _stride(total_rows),
        rows.stride(0),
        ADD=d_total is not None,
        WEIGHTED=weight is not None,
        NEED_X=dx is not None,
        NEED_WEIGHT=summed is not None,
        **constants,
    )
    if summed is not None:
        gradients["weight"] = sums.sum(dim=0).to(summed.dtype)
    return gradients
