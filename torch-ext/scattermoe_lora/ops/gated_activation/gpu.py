"""Triton implementation: one pass forward, one backward."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .kernels import gated_backward_kernel, gated_forward_kernel
from .limits import LARGEST, LIMIT

# Columns of a row that a program computes, with four warps: 16 bytes of bfloat16 a thread and load.
_COLUMNS = 1024


def constants_of(dtype: torch.dtype, columns: int, activation: str) -> dict[str, Any]:
    """The kernels' constants for rows of so many columns."""
    half = dtype == torch.float16
    return {
        "LARGEST": LARGEST if half else None,
        "LIMIT": LIMIT if half else None,
        "ACTIVATION": activation,
        "BLOCK": min(_COLUMNS, triton.next_power_of_2(columns)),
    }


def _launch(kernel: Any, sources: list[torch.Tensor], targets: list[torch.Tensor], activation: str) -> None:
    """Runs a kernel over rows: ``sources`` of any row stride, contiguous ``targets``."""
    if targets[0].dtype == torch.float64:
        raise NotImplementedError(
            "gated_activation: gate: float64 runs on the CPU only; use float32 on this device"
        )
    if not targets[0].numel():
        return
    columns = targets[0].shape[-1]
    rows = [t.reshape(-1, columns) for t in sources]
    rows = [t if t.stride(1) == 1 else t.contiguous() for t in rows]
    constants = constants_of(targets[0].dtype, columns, activation)
    grid = rows[0].shape[0], triton.cdiv(columns, constants["BLOCK"])
    kernel[grid](*rows, *targets, columns, *(t.stride(0) for t in rows), **constants)


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See :func:`scattermoe_lora.ops.gated_activation.op.gated_activation_forward`."""
    out = gate.new_empty(gate.shape)
    _launch(gated_forward_kernel, [gate, up], [out], activation)
    return out


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.gated_activation.op.gated_activation_backward`."""
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _launch(gated_backward_kernel, [dy, gate, up], [d_gate, d_up], activation)
    return d_gate, d_up
