"""The fused experts layer as torch operators, with fake implementations and autograd.

Quantized weights have operators of their own, which differ in their arguments alone.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..activation import Gate
from ..operator import computation, flattened, names_needed, register_gradients
from ..quantization.stack import QuantizedStack
from ..routing import empty_gradient, refuse_index_outside
from . import cpu
from .arguments import Kept, Operands, Quantization

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def experts(operands: Operands, gate: Gate, sentinels: bool, keep: bool) -> Result:
    """:func:`experts_forward` of weights each of which is dense or quantized."""
    result: Result
    if isinstance(operands.gate_up, QuantizedStack) or isinstance(operands.down, QuantizedStack):
        codes, quantization = operands.take_apart()
        result = forward_quantized(*codes, *quantization, *gate, sentinels, keep)
    else:
        result = forward(*operands, *gate, sentinels, keep)
    return result


def _implementation(x: torch.Tensor) -> Any:
    if dispatch.use_triton(x):
        from . import gpu

        return gpu
    return cpu


def _forward(operands: Operands, gate: Gate, sentinels: bool, keep: bool) -> Result:
    refuse_index_outside(operands.order, operands.offsets, sentinels)
    result: Result = _implementation(operands.x).forward(operands, gate, keep)
    return result


def _fake_forward(operands: Operands, keep: bool) -> Result:
    x, rows = operands.x, operands.order.shape[0] if keep else 0
    hidden, low1, low2 = (x.new_empty((rows, n)) for n in (operands.gate_up.shape[1], *operands.ranks))
    return x.new_empty(x.shape), hidden, low1, low2


def _backward(
    grad_out: torch.Tensor, operands: Operands, kept: Kept, gate: Gate, needs: list[bool]
) -> list[torch.Tensor]:
    assert kept.hidden.shape[0] == operands.order.shape[0], "autograd needs what only keep=True returns"
    names = names_needed(operands, needs)
    gradients = _implementation(operands.x).backward(grad_out, operands, kept, gate, names)
    return [gradients[name] for name in names]


def _fake_backward(operands: Operands, needs: list[bool]) -> list[torch.Tensor]:
    return [empty_gradient(getattr(operands, name)) for name in names_needed(operands, needs)]


@torch.library.custom_op("scattermoe_lora::experts_forward", mutates_args=())
@computation
def experts_forward(operands: Operands, gate: Gate, sentinels: bool, keep: bool) -> Result:
    """Gated experts with low-rank factors: ``sum_k w[t, k] * down(gate(gate_up(x[t])))``.

    Args:
        operands: Input, parameters and routing.
        gate: The gated activation.
        sentinels: Whether an index ``>= E`` is a pair without an expert here, or an error (seen on the CPU alone).
        keep: Whether to return what the backward needs; otherwise the last three results have no rows.

    Returns:
        The output ``[T, H]``, and the fields of a :class:`scattermoe_lora.ops.experts.arguments.Kept`.
    """
    return _forward(operands, gate, sentinels, keep)


@experts_forward.register_fake
@flattened
def _(operands: Operands, gate: Gate, sentinels: bool, keep: bool) -> Result:
    return _fake_forward(operands, keep)


@torch.library.custom_op("scattermoe_lora::experts_quantized_forward", mutates_args=())
@computation
def experts_quantized_forward(
    operands: Operands, quantization: Quantization, gate: Gate, sentinels: bool, keep: bool
) -> Result:
    """:func:`experts_forward` with codes in a weight's place, or in both weights'."""
    return _forward(operands.put_together(quantization), gate, sentinels, keep)


@experts_quantized_forward.register_fake
@flattened
def _(operands: Operands, quantization: Quantization, gate: Gate, sentinels: bool, keep: bool) -> Result:
    return _fake_forward(operands.put_together(quantization), keep)


@torch.library.custom_op("scattermoe_lora::experts_backward", mutates_args=())
@computation
def experts_backward(
    grad_out: torch.Tensor, operands: Operands, kept: Kept, gate: Gate, needs: list[bool]
) -> list[torch.Tensor]:
    """Gradients of :func:`experts_forward`.

    Args:
        grad_out: ``[T, H]``.
        operands, gate: As in the forward.
        kept: What the forward kept, called with ``keep``.
        needs: One flag for each operand but the routing.

    Returns:
        The gradients that ``needs`` asks for, in the order of the operands. With ``gate_up`` and ``down`` frozen
        nothing of their size is allocated.
    """
    return _backward(grad_out, operands, kept, gate, needs)


@experts_backward.register_fake
@flattened
def _(
    grad_out: torch.Tensor, operands: Operands, kept: Kept, gate: Gate, needs: list[bool]
) -> list[torch.Tensor]:
    return _fake_backward(operands, needs)


@torch.library.custom_op("scattermoe_lora::experts_quantized_backward", mutates_args=())
@computation
def experts_quantized_backward(
    grad_out: torch.Tensor,
    operands: Operands,
    kept: Kept,
    quantization: Quantization,
    gate: Gate,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of :func:`experts_quantized_forward`, which has none of a quantized weight."""
    return _backward(grad_out, operands.put_together(quantization), kept, gate, needs)


@experts_quantized_backward.register_fake
@flattened
def _(
    grad_out: torch.Tensor,
    operands: Operands,
    kept: Kept,
    quantization: Quantization,
    gate: Gate,
    needs: list[bool],
) -> list[torch.Tensor]:
    return _fake_backward(operands.put_together(quantization), needs)


forward = register_gradients(experts_forward, experts_backward, Operands, dropped=2)
forward_quantized = register_gradients(
    experts_quantized_forward, experts_quantized_backward, Operands, dropped=2
)
for _by in (experts_backward, experts_quantized_backward):
    dispatch.refuse_second_derivative("experts_forward", _by)
