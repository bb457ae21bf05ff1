"""Per-expert linear over routed tokens as torch operators, with fake implementations and autograd.

A quantized weight has operators of its own, which differ in their arguments alone.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..operator import computation, flattened, names_needed, register_gradients
from ..quantization.stack import QuantizedStack
from ..routing import empty_gradient, refuse_index_outside
from . import cpu
from .arguments import Operands, Quantization

Result = tuple[torch.Tensor, torch.Tensor]


def linear(operands: Operands, top_k: int, sentinels: bool) -> Result:
    """:func:`grouped_linear_forward` of a dense or a quantized weight."""
    result: Result
    if isinstance(operands.weight, QuantizedStack):
        codes, quantization = operands.take_apart()
        result = forward_quantized(*codes, *quantization, top_k, sentinels)
    else:
        result = forward(*operands, top_k, sentinels)
    return result


def _implementation(x: torch.Tensor) -> Any:
    if dispatch.use_triton(x):
        from . import gpu

        return gpu
    return cpu


def _forward(operands: Operands, top_k: int, sentinels: bool) -> Result:
    refuse_index_outside(operands.order, operands.offsets, sentinels)
    result: Result = _implementation(operands.x).forward(operands, top_k)
    return result


def _fake_forward(operands: Operands) -> Result:
    x, weight, a, *_ = operands
    pairs = operands.order.shape[0]
    return x.new_empty((pairs, weight.shape[1])), x.new_empty((pairs, 0 if a is None else a.shape[1]))


def _backward(
    dy: torch.Tensor, operands: Operands, low: torch.Tensor, top_k: int, needs: list[bool]
) -> list[torch.Tensor]:
    names = names_needed(operands, needs)
    gradients = _implementation(operands.x).backward(dy, operands, low, top_k, names)
    return [gradients[name] for name in names]


def _fake_backward(operands: Operands, needs: list[bool]) -> list[torch.Tensor]:
    return [empty_gradient(getattr(operands, name)) for name in names_needed(operands, needs)]


@torch.library.custom_op("scattermoe_lora::grouped_linear_forward", mutates_args=())
@computation
def grouped_linear_forward(operands: Operands, top_k: int, sentinels: bool) -> Result:
    """``y[s] = (W[e] + B[e] A[e]) x[row] + bias[e]`` for every token-expert pair s.

    Args:
        operands: Rows, parameters and routing.
        top_k: K.
        sentinels: Whether an index ``>= E`` is a pair without an expert here, or an error (seen on the CPU alone).

    Returns:
        ``y`` ``[S, N_out]`` by pair, zero where no expert here handles it; and ``x A^T`` ``[S, r]`` in sorted order for
        the backward.
    """
    return _forward(operands, top_k, sentinels)


@grouped_linear_forward.register_fake
@flattened
def _(operands: Operands, top_k: int, sentinels: bool) -> Result:
    return _fake_forward(operands)


@torch.library.custom_op("scattermoe_lora::grouped_linear_quantized_forward", mutates_args=())
@computation
def grouped_linear_quantized_forward(
    operands: Operands, quantization: Quantization, top_k: int, sentinels: bool
) -> Result:
    """:func:`grouped_linear_forward` with codes in the weight's place."""
    return _forward(operands.put_together(quantization), top_k, sentinels)


@grouped_linear_quantized_forward.register_fake
@flattened
def _(operands: Operands, quantization: Quantization, top_k: int, sentinels: bool) -> Result:
    return _fake_forward(operands.put_together(quantization))


@torch.library.custom_op("scattermoe_lora::grouped_linear_backward", mutates_args=())
@computation
def grouped_linear_backward(
    dy: torch.Tensor, operands: Operands, low: torch.Tensor, top_k: int, needs: list[bool]
) -> list[torch.Tensor]:
    """Gradients of :func:`grouped_linear_forward`.

    Args:
        dy: ``[S, N_out]`` by pair.
        operands, top_k: As in the forward.
        low: The second result of the forward.
        needs: One flag each for ``x``, ``weight``, ``a``, ``b`` and ``bias``.

    Returns:
        The gradients that ``needs`` asks for, in that order. With ``weight`` frozen nothing of its size is allocated.
    """
    return _backward(dy, operands, low, top_k, needs)


@grouped_linear_backward.register_fake
@flattened
def _(
    dy: torch.Tensor, operands: Operands, low: torch.Tensor, top_k: int, needs: list[bool]
) -> list[torch.Tensor]:
    return _fake_backward(operands, needs)


@torch.library.custom_op("scattermoe_lora::grouped_linear_quantized_backward", mutates_args=())
@computation
def grouped_linear_quantized_backward(
    dy: torch.Tensor,
    operands: Operands,
    low: torch.Tensor,
    quantization: Quantization,
    top_k: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of :func:`grouped_linear_quantized_forward`, which has none of the weight."""
    return _backward(dy, operands.put_together(quantization), low, top_k, needs)


@grouped_linear_quantized_backward.register_fake
@flattened
def _(
    dy: torch.Tensor,
    operands: Operands,
    low: torch.Tensor,
    quantization: Quantization,
    top_k: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    return _fake_backward(operands.put_together(quantization), needs)


forward = register_gradients(grouped_linear_forward, grouped_linear_backward, Operands, dropped=1)
forward_quantized = register_gradients(
    grouped_linear_quantized_forward, grouped_linear_quantized_backward, Operands, dropped=1
)
for _by in (grouped_linear_backward, grouped_linear_quantized_backward):
    dispatch.refuse_second_derivative("grouped_linear", _by)
