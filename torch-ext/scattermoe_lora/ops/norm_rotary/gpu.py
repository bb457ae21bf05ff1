"""Triton implementation: one pass over the rows forward, one backward."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import tile_tables
from ..launch import cdiv, contiguous_like, next_power_of_2
from ..launcher import launch_kernel
from .arguments import Operands
from .kernels import rotary_backward_kernel, rotary_forward_kernel

TILES = Path(__file__).parent / "tiles"
# Programs that sum the weight's gradient, each into a row of its own, unless the launch says how many: a fixed number,
# so that the order of the sums, and with it every bit of the result, is the same on every device.
_SUMMING_PROGRAMS = 2048


def _refuse_float64(x: torch.Tensor) -> None:
    if x.dtype == torch.float64:
        raise NotImplementedError(
            "rms_norm_rotary: x: float64 runs on the CPU only; use float32 on this device"
        )


def tile(kernel: str, x: torch.Tensor, rotated: int, d_weight: bool = False) -> Mapping[str, int]:
    """The launch of ``rotary_forward`` or ``rotary_backward`` for ``x`` ``[B, S, H, D]``.

    Args:
        kernel: Name of the kernel in the tables.
        x: Its device, element size, heads and head size count.
        rotated: Number of rotated columns.
        d_weight: Whether the weight's gradient is summed.

    Returns:
        ``ELEMENTS`` of ``x`` that a program holds at a time, and ``num_warps``. The rest is optional: ``PRELOAD`` reads
        the weight ahead of the rows, once a program; ``BY_TOKEN`` lets a program go through the heads of its tokens,
        whose cosines and sines it reads once; ``PROGRAMS`` a multiprocessor go through all blocks of the backward (else
        there is one a block, or 2048 that sum the weight's gradient); ``num_stages`` above 1 copies ahead in loops.
    """
    sizes = {"head_dim": x.shape[3], "heads": x.shape[2], "rotated": rotated > 0, "d_weight": d_weight}
    return tile_tables.find(TILES, tile_tables.table_of(x.device), kernel, x.dtype, sizes)


def constants_of(launch: Mapping[str, int], heads: int, head_dim: int, rotated: int) -> dict[str, Any]:
    """The kernels' constants and options that a launch and the sizes of rows give."""
    half, rest = rotated // 2, head_dim - rotated
    # Triton has no empty range: a part without columns has a width, and no code.
    widths = [next_power_of_2(max(length, 1)) for length in (half, rest)]
    across = 2 * widths[0] * (half > 0) + widths[1] * (rest > 0)
    by_token = bool(launch.get("BY_TOKEN"))
    return {
        "HEADS": heads,
        "INNER": heads if by_token else 1,
        "HALF": half,
        "REST": rest,
        "HALF_WIDTH": widths[0],
        "REST_WIDTH": widths[1],
        "PRELOAD": by_token or bool(launch.get("PRELOAD")),
        "BLOCK": next_power_of_2(launch["ELEMENTS"] // across // 2 + 1),
        "STAGES": launch.get("num_stages", 1),
        "num_warps": launch["num_warps"],
    }


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Those of a GPU that torch calls ``cuda``; 1 of any other device."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    out = contiguous_like(x, operands.out_dtype)
    if not x.numel():
        return out
    x_rows, cos, sin = _rows_in_place(x), _rows_in_place(cos), _rows_in_place(sin)
    assert x_rows is not None
    rotated = 0 if cos is None else cos.shape[-1]
    constants = constants_of(tile("rotary_forward", x, rotated), heads, head_dim, rotated)
    groups = tokens * heads // constants["INNER"]
    blocks = cdiv(groups, constants["BLOCK"])
    launch_kernel(
        rotary_forward_kernel,
        (batch * blocks, 1, 1),
        (
            x_rows,
            None if weight is None else weight.contiguous(),
            cos,
            sin,
            out,
            groups,
            blocks,
            eps,
            *x_rows.stride()[:3],
            *_strides(cos, batch),
            *_strides(sin, batch),
        ),
        {"WEIGHTED": weight is not None, **constants},
    )
    return out


def backward(dy: torch.Tensor, operands: Operands, names: Collection[str]) -> dict[str, torch.Tensor]:
    """See :func:`scattermoe_lora.ops.norm_rotary.op.norm_rotary_backward`."""
    x, weight, cos, sin, eps = operands
    _refuse_float64(x)
    batch, tokens, heads, head_dim = x.shape
    summed = weight if "weight" in names else None
    dx = contiguous_like(x) if "x" in names else None
    gradients = {} if dx is None else {"x": dx}
    if not x.numel():
        if summed is not None:
            gradients["weight"] = torch.zeros_like(summed)
        return gradients
    dy_rows, x_rows, cos, sin = (_rows_in_place(t) for t in (dy, x, cos, sin))
    assert dy_rows is not None
    assert x_rows is not None
    rotated = 0 if cos is None else cos.shape[-1]
    launch = tile("rotary_backward", x, rotated, summed is not None)
    constants = constants_of(launch, heads, head_dim, rotated)
    groups = tokens * heads // constants["INNER"]
    blocks = cdiv(groups, constants["BLOCK"])
    programs = batch * blocks
    if "PROGRAMS" in launch:
        programs = min(programs, launch["PROGRAMS"] * _multiprocessors(x.device))
    elif summed is not None:
        programs = min(programs, _SUMMING_PROGRAMS)
    sums: Any = x.new_empty((programs, head_dim), dtype=torch.float32) if summed is not None else None
    launch_kernel(
        rotary_backward_kernel,
        (programs, 1, 1),
        (
            dy_rows,
            x_rows,
            None if weight is None else weight.contiguous(),
            cos,
            sin,
            dx,
            sums,
            groups,
            blocks,
            batch * blocks,
            eps,
            *dy_rows.stride()[:3],
            *x_rows.stride()[:3],
            *_strides(cos, batch),
            *_strides(sin, batch),
        ),
        {
            "WEIGHTED": weight is not None,
            "NEED_X": dx is not None,
            "NEED_WEIGHT": summed is not None,
            **constants,
        },
    )
    if summed is not None:
        gradients["weight"] = sums.sum(dim=0).to(summed.dtype)
    return gradients
