"""Triton implementation: one pass over the rows forward, one backward."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from ..launch import cdiv, contiguous_like, next_power_of_2, rows_of
from ..launcher import launch_kernel
from .arguments import Operands
from .kernels import rms_backward_kernel, rms_forward_kernel

# Programs that sum the weight's gradient, each into a row of its own: a fixed number, so that the order of the sums,
# and with it every bit of the result, is the same on every device.
_SUMMING_PROGRAMS = 1024
# Elements that a program holds at a time, if a row is not longer.
_ELEMENTS = 2048


def constants_of(size: int) -> dict[str, int]:
    """Rows at a time, their width and ``num_warps`` for rows of ``size``."""
    width = next_power_of_2(size)
    rows = max(_ELEMENTS // width, 1)
    return {"ROWS": rows, "WIDTH": width, "num_warps": min(max(rows * width // 1024, 4), 16)}


def _rows_of(t: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    return (None, 0) if t is None else rows_of(t)


def _check(x: torch.Tensor) -> None:
    if x.dtype == torch.float64:
        raise NotImplementedError("rms_norm: x: float64 runs on the CPU only; use float32 on this device")


def forward(operands: Operands, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.rms_norm.op.rms_norm_forward`."""
    x, weight, eps, offset, round_first = operands
    _check(x)
    size = x.shape[-1]
    out = contiguous_like(x, operands.out_dtype)
    total = x.new_empty(0) if residual is None else contiguous_like(x)
    if not x.numel():
        return out, total
    constants = constants_of(size)
    rows, stride = rows_of(x)
    residual_rows, residual_stride = _rows_of(residual)
    count = x.numel() // size
    launch_kernel(
        rms_forward_kernel,
        (cdiv(count, constants["ROWS"]), 1, 1),
        (
            rows,
            residual_rows,
            None if weight is None else weight.contiguous(),
            out,
            total,
            count,
            size,
            eps,
            offset,
            stride,
            residual_stride,
        ),
        {
            "ADD": residual is not None,
            "WEIGHTED": weight is not None,
            "ROUND_FIRST": round_first,
            **constants,
        },
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
    dx = contiguous_like(x) if "x" in names else None
    gradients = {} if dx is None else {"x": dx}
    if not x.numel():
        if summed is not None:
            gradients["weight"] = torch.zeros_like(summed)
        return gradients
    constants = constants_of(size)
    (rows, stride), (dy_rows, dy_stride) = rows_of(x), rows_of(dy)
    total_rows, total_stride = _rows_of(d_total)
    count = x.numel() // size
    blocks = cdiv(count, constants["ROWS"])
    programs = blocks if summed is None else min(blocks, _SUMMING_PROGRAMS)
    sums: Any = x.new_empty((programs, size), dtype=torch.float32) if summed is not None else None
    launch_kernel(
        rms_backward_kernel,
        (programs, 1, 1),
        (
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
            dy_stride,
            total_stride,
            stride,
        ),
        {
            "ADD": d_total is not None,
            "WEIGHTED": weight is not None,
            "NEED_X": dx is not None,
            "NEED_WEIGHT": summed is not None,
            **constants,
        },
    )
    if summed is not None:
        gradients["weight"] = sums.sum(dim=0).to(summed.dtype)
    return gradients
