"""The public building blocks: RMSNorm of hidden states, and a residual's sum with its RMSNorm, in one operator each."""

from __future__ import annotations

import torch

from .. import dispatch
from . import op

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    round_first: bool = False,
) -> torch.Tensor:
    """``(weight + offset) * x * (mean(x^2) + eps)^-1/2`` over the last dimension (Zhang & Sennrich, 2019).

    In float32, and rounded once at the end, as Gemma's norms (the first three Gemmas' have ``offset=1``); with
    ``round_first`` also before the weight multiplies, as Llama's. The backward keeps ``x`` alone and computes in
    float32 throughout.

    Differentiable once in ``x`` and ``weight``. The same input gives the same bits.

    Args:
        x: ``[*, H]``, any strides. float64 (on the CPU only, computed in float64), float32, bfloat16 or float16.
        weight: ``[H]``, any of these dtypes. None normalises without.
        eps: Added to the mean of squares.
        offset: Added to the weight.
        round_first: See above.

    Returns:
        ``[*, H]``, contiguous; the dtype of ``x``, with ``round_first`` what it and the weight's promote to.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit together; the message names argument, expected and got.
        NotImplementedError: float64 on a GPU; forward-mode differentiation, ``torch.func.grad`` and second derivatives.
    """
    _check("rms_norm", x, weight)
    dispatch.refuse_transforms("rms_norm", x, weight)
    out: torch.Tensor = op.forward(x, weight, eps, offset, round_first, None)[0]
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    round_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm(x + residual)`` and ``x + residual``, in one pass forward and one backward.

    Args:
        x, residual: ``[*, H]``, of one shape, dtype and device.
        weight, eps, offset, round_first: As :func:`rms_norm` takes them.

    Returns:
        The normalised sum, and the sum, rounded to the dtype of ``x``, both ``[*, H]``. The backward keeps the sum
        alone.

    Raises:
        ValueError, NotImplementedError: As :func:`rms_norm`.
    """
    _check("add_rms_norm", x, weight)
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(x, what), getattr(residual, what)
        if expected != got:
            as_text = [list(value) if what == "shape" else value for value in (expected, got)]
            raise ValueError(f"add_rms_norm: residual: expected {what} of x, {as_text[0]}, got {as_text[1]}")
    dispatch.refuse_transforms("add_rms_norm", x, residual, weight)
    out, total = op.forward(x, weight, eps, offset, round_first, residual)
    return out, total


def _check(function: str, x: torch.Tensor, weight: torch.Tensor | None) -> None:
    def refuse(name: str, expected: str, got: object) -> None:
        raise ValueError(f"{function}: {name}: expected {expected}, got {got}")

    if x.dim() == 0 or x.shape[-1] == 0:
        refuse("x", "[*, H] with H of at least 1", list(x.shape))
    if x.dtype not in _DTYPES:
        refuse("x", "float64, float32, bfloat16 or float16", x.dtype)
    if weight is None:
        return
    if weight.shape != x.shape[-1:]:
        refuse("weight", f"shape {list(x.shape[-1:])}", list(weight.shape))
    if weight.dtype not in _DTYPES:
        refuse("weight", "float64, float32, bfloat16 or float16", weight.dtype)
    if weight.device != x.device:
        refuse("weight", f"device of x, {x.device}", weight.device)
