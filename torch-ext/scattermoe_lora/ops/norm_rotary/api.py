"""The public building block: RMSNorm of attention heads, rotated by their positions, in one operator."""

from __future__ import annotations

import torch

from .. import dispatch
from . import op

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rms_norm_rotary(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """RMSNorm over the last dimension, then rotary position embedding: Gemma 4's queries, keys and values.

    ``n = weight * x * (mean(x^2) + eps)^-1/2`` in float32 (Zhang & Sennrich, 2019; the weight as it is, without one
    added), rounded to the dtype of ``x``; then ``n * cos + rotate_half(n) * sin`` (Su et al., 2021), where
    ``rotate_half`` pairs column ``i`` with ``i + rot / 2``. Every rounding stands where transformers' code for Gemma 4
    has it. Neither the normalised nor the turned tensor is stored: the backward takes ``x`` alone, and computes in
    float32 throughout.

    Differentiable once in ``x`` and ``weight``. The same input gives the same bits.

    Args:
        x: ``[B, S, H, D]`` as it comes out of a projection's view, any strides; ``D`` even. float64 (on the CPU only,
            computed in float64), float32, bfloat16 or float16.
        weight: ``[D]``, any of these dtypes. None normalises without a weight, as Gemma 4's values.
        cos, sin: ``[B, S, rot]``, or ``[1, S, rot]`` for all of the batch, ``rot <= D`` even: the first ``rot`` columns
            are rotated, the rest is not. Of the dtype of ``x``, or float32. They get no gradient. None for both leaves
            the rotation out.
        eps: Added to the mean of squares.

    Returns:
        ``[B, S, H, D]``, contiguous; the dtype of ``x``, or float32 where ``cos`` and ``sin`` are.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit together; the message names argument, expected and got.
        NotImplementedError: float64 on a GPU; forward-mode differentiation, ``torch.func.grad`` and second derivatives.
    """
    _check(x, weight, cos, sin)
    dispatch.refuse_transforms("rms_norm_rotary", x, weight, cos, sin)
    out: torch.Tensor = op.forward(x, weight, cos, sin, eps)
    return out


def _refuse(name: str, expected: str, got: object) -> None:
    raise ValueError(f"rms_norm_rotary: {name}: expected {expected}, got {got}")


def _check(
    x: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> None:
    if x.dim() != 4:
        _refuse("x", "[B, S, H, D]", list(x.shape))
    if x.dtype not in _DTYPES:
        _refuse("x", "float64, float32, bfloat16 or float16", x.dtype)
    batch, tokens, _, head_dim = x.shape
    if head_dim == 0 or head_dim % 2:
        _refuse("x", "an even head_dim (its last dimension)", head_dim)
    if weight is not None:
        if weight.shape != (head_dim,):
            _refuse("weight", f"shape [{head_dim}]", list(weight.shape))
        if weight.dtype not in _DTYPES:
            _refuse("weight", "float64, float32, bfloat16 or float16", weight.dtype)
        if weight.device != x.device:
            _refuse("weight", f"device of x, {x.device}", weight.device)
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("rms_norm_rotary: cos and sin are given together or not at all")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.dim() != 3 or angles.shape[0] not in (1, batch) or angles.shape[1] != tokens:
            _refuse(name, f"shape [{batch} or 1, {tokens}, rot]", list(angles.shape))
        rotated = angles.shape[2]
        if rotated == 0 or rotated % 2 or rotated > head_dim:
            _refuse(name, f"an even last dimension between 2 and head_dim {head_dim}", rotated)
        if angles.dtype not in (x.dtype, torch.float32) or (
            x.dtype == torch.float64 and angles.dtype != torch.float64
        ):
            also = " or float32" if x.dtype in (torch.bfloat16, torch.float16) else ""
            _refuse(name, f"dtype of x, {x.dtype}{also}", angles.dtype)
        if angles.device != x.device:
            _refuse(name, f"device of x, {x.device}", angles.device)
        if angles.requires_grad:
            raise ValueError(f"rms_norm_rotary: {name} gets no gradient; pass {name}.detach()")
    if cos.shape != sin.shape:
        _refuse("sin", f"shape of cos, {list(cos.shape)}", list(sin.shape))
    if cos.dtype != sin.dtype:
        _refuse("sin", f"dtype of cos, {cos.dtype}", sin.dtype)
