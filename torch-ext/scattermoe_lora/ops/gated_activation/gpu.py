"""Triton implementation: one pass forward, one backward."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..launch import cdiv, contiguous_like, next_power_of_2, rows_of
from ..launcher import launch_kernel
from .kernels import gated_backward_kernel, gated_forward_kernel
from .limits import LARGEST, LIMIT

# Columns of a row that a program computes, with four warps: 16 bytes of bfloat16 a thread and load.
_COLUMNS = 1024


@functools.cache
def constants_of(dtype: torch.dtype, columns: int, activation: str) -> Mapping[str, Any]:
    """The kernels' constants for rows of so many columns."""
    half = dtype == torch.float16
    constants = {
        "LARGEST": LARGEST if half else None,
        "LIMIT": LIMIT if half else None,
        "ACTIVATION": activation,
        "BLOCK": min(_COLUMNS, next_power_of_2(columns)),
    }
    return MappingProxyType(constants)


def _launch(kernel: Any, sources: list[torch.Tensor], targets: list[torch.Tensor], activation: str) -> None:
    """Runs a kernel over rows: ``sources`` of any strides, contiguous ``targets``."""
    target = targets[0]
    dtype = target.dtype
    if dtype == torch.float64:
        raise NotImplementedError(
            "gated_activation: gate: float64 runs on the CPU only; use float32 on this device"
        )
    size = target.numel()
    if not size:
        return
    columns = target.shape[-1]
    constants = constants_of(dtype, columns, activation)
    rows = [rows_of(source) for source in sources]
    arguments = [*(t for t, _ in rows), *targets, columns, *(stride for _, stride in rows)]
    launch_kernel(kernel, (size // columns, cdiv(columns, constants["BLOCK"]), 1), arguments, constants)


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See :func:`scattermoe_lora.ops.gated_activation.op.gated_activation_forward`."""
    out = contiguous_like(gate)
    _launch(gated_forward_kernel, [gate, up], [out], activation)
    return out


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.gated_activation.op.gated_activation_backward`."""
    d_gate, d_up = contiguous_like(gate), contiguous_like(up)
    _launch(gated_backward_kernel, [dy, gate, up], [d_gate, d_up], activation)
    return d_gate, d_up
