"""The fused experts layer as torch operators, with fake implementations and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..activation import Gate
from ..operator import by_argument, flattened, names_needed
from ..routing import empty_gradient, refuse_index_outside
from . import cpu
from .arguments import Kept, Operands

_TENSORS = len(Operands._fields)
# Those before the routing, which has no gradient.
_DIFFERENTIABLE = _TENSORS - 2


def _implementation(x: torch.Tensor) -> Any:
    if dispatch.use_triton(x):
        from . import gpu

        return gpu
    return cpu


@torch.library.custom_op("scattermoe_lora::experts_forward", mutates_args=())
@flattened
def experts_forward(
    operands: Operands, gate: Gate, sentinels: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gated experts with low-rank factors: ``sum_k w[t, k] * down(gate(gate_up(x[t])))``.

    Args:
        operands: Input, parameters and routing.
        gate: The gated activation.
        sentinels: Whether an index ``>= E`` is a pair without an expert here, or an error (seen on the CPU alone).
        keep: Whether to return what the backward needs; otherwise the last three results have no rows.

    Returns:
        The output ``[T, H]``, and the fields of a :class:`scattermoe_lora.ops.experts.arguments.Kept`.
    """
    refuse_index_outside(operands.order, operands.offsets, sentinels)
    with dispatch.undisturbed(operands.x):
        return _implementation(operands.x).forward(operands, gate, keep)


@experts_forward.register_fake
@flattened
def _(
    operands: Operands, gate: Gate, sentinels: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, rows = operands.x, operands.order.shape[0] if keep else 0
    hidden, low1, low2 = (x.new_empty((rows, n)) for n in (operands.gate_up.shape[1], *operands.ranks))
    return x.new_empty(x.shape), hidden, low1, low2


@torch.library.custom_op("scattermoe_lora::experts_backward", mutates_args=())
@flattened
def experts_backward(
    grad_out: torch.Tensor, operands: Operands, kept: Kept, gate: Gate, needs: list[bool]
) -> list[torch.Tensor]:
    """Gradients of :func:`experts_forward`.

    Args:
        grad_out: ``[T, H]``.
        operands, gate: As in the forward.
        kept: What the forward kept.
        needs: One flag for each operand but the routing.

    Returns:
        The gradients that ``needs`` asks for, in the order of the operands. With ``gate_up`` and ``down`` frozen
        nothing of their size is allocated.
    """
    names = names_needed(operands, needs)
    with dispatch.undisturbed(operands.x):
        gradients = _implementation(operands.x).backward(grad_out, operands, kept, gate, names)
    return [gradients[name] for name in names]


@experts_backward.register_fake
@flattened
def _(
    grad_out: torch.Tensor, operands: Operands, kept: Kept, gate: Gate, needs: list[bool]
) -> list[torch.Tensor]:
    return [empty_gradient(getattr(operands, name)) for name in names_needed(operands, needs)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *ctx.gate, _, keep = inputs[_TENSORS:]
    assert keep, "autograd needs what only keep=True returns"
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_out is None:
        return by_argument(ctx, (), ())
    needs = [bool(need) for need in ctx.needs_input_grad[:_DIFFERENTIABLE]]
    gradients = experts_backward(grad_out.contiguous(), *ctx.saved_tensors, *ctx.gate, needs)
    return by_argument(ctx, gradients, needs)


experts_forward.register_autograd(_backward, setup_context=_setup_context)
dispatch.refuse_second_derivative("experts_forward", experts_backward)
