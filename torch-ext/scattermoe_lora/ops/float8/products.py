"""Products with weights in float8 and the gradients of these, of which one matrix is dense at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from ..routing import Routing
from .gradient import Float8Gradient
from .rounding import E4M3


def linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b``, the weight decoded for this product and again for its backward.

    Args:
        x: ``[..., K]`` in the dtype to compute in; under autocast that of autocast.
        weight: A :class:`.weight.Float8Weight` ``[N, K]``, or x is one and the weight is not.
        bias: ``[N]`` or None.
    """
    if not hasattr(weight, "codes"):
        return F.linear(x.dequantize(), weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Linear.apply(x, weight, None if bias is None else bias.to(x.dtype))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        if weight.has_float8_products and not (weight.shape[0] % 16 or weight.shape[1] % 16):
            return _scaled_product(x, weight, bias)
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[1]:
            dw = (rows.mT @ inputs).to(weight.dtype)
            if not weight.is_gathered:
                dw = Float8Gradient.from_dense(dw, stochastic=True)
        if ctx.needs_input_grad[0]:
            dx = (rows @ weight.dequantize(dy.dtype)).view_as(x)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db


def refuse_without_products(device: torch.device, label: str) -> None:
    """Raises NotImplementedError where a device does not multiply numbers in float8 (before Ada and Hopper)."""
    if (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 9)
    ):
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    raise NotImplementedError(
        f"{label}: expected a GPU that multiplies in float8 (NVIDIA Ada, Hopper or later), got {name}; leave "
        "float8_products False: weights and gradients are kept in float8 there as well"
    )


def _scaled_product(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """``x W^T + b`` of numbers in E4M3: x with a scale of its own, W with the largest of its blocks' scales.

    Scales are powers of two, so elements of W are the same numbers on another scale, but for those that are less than
    2**-15 of the largest; a GPU multiplies with one scale for each operand.
    """
    rows = x.reshape(-1, x.shape[-1])
    scale_x = (rows.abs().amax().float() / E4M3.greatest).clamp(min=torch.finfo(torch.float32).tiny)
    scale_w = weight.scales.amax()
    codes_x = (rows / scale_x).to(E4M3.dtype)
    codes_w = (weight.dequantize(torch.float32) / scale_w).to(E4M3.dtype)
    out_dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    y = torch._scaled_mm(codes_x, codes_w.mT, scale_x, scale_w, out_dtype=out_dtype).to(x.dtype)
    y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], y.shape[-1])


def with_weight_gradient(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: Any,
    routing: Routing,
    top_k: int,
    is_transposed: bool = False,
) -> torch.Tensor:
    """``y``, through which the weight of the experts that computed it gets its gradient.

    The operators of quantized experts have no gradient of the weight. This one makes it an expert at a time, and
    rounds it to float8 before the next expert's.

    Args:
        y: ``[S, N]`` by pair, what the experts made of ``x``.
        x: ``[T, K]``, or ``[S, K]`` by pair.
        weight: A :class:`.weight.Float8Weight` ``[E, N, K]`` (``[E, K, N]`` if ``is_transposed``).
        routing: Pairs sorted by expert.
        top_k: Pairs of a token.
    """
    return _ExpertsWeight.apply(y, x, weight, *routing, top_k, is_transposed)


class _ExpertsWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        weight: Any,
        order: torch.Tensor,
        offsets: torch.Tensor,
        top_k: int,
        is_transposed: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, order, offsets)
        ctx.settings = top_k, is_transposed
        ctx.shape, ctx.dtype, ctx.is_gathered = weight.shape, weight.dtype, weight.is_gathered
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, order, offsets = ctx.saved_tensors
        top_k, is_transposed = ctx.settings
        gradient: Any = (
            dy.new_zeros(ctx.shape, dtype=ctx.dtype)
            if ctx.is_gathered
            else Float8Gradient.zeros(ctx.shape, ctx.dtype, dy.device)
        )
        rows = order if x.shape[0] == order.shape[0] else order // top_k
        for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
            if start == end:
                continue
            dy_e, x_e = dy[order[start:end]], x[rows[start:end]]
            matrix = x_e.mT @ dy_e if is_transposed else dy_e.mT @ x_e
            if ctx.is_gathered:
                gradient[expert] = matrix
            else:
                gradient.write(expert, matrix, stochastic=True)
        return dy, None, gradient, None, None, None, None
