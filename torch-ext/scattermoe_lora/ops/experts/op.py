"""The fused experts layer as torch operators, with fake implementations and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..activation import Gate
from ..routing import empty_gradient, refuse_index_outside
from . import cpu


@torch.library.custom_op("scattermoe_lora::experts_forward", mutates_args=())
def experts_forward(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    order: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    shift: float,
    sentinels: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gated experts with low-rank factors: ``sum_k w[t, k] * down(gate(gate_up(x[t])))``.

    Args:
        x: ``[T, H]``, like every other floating-point argument but ``routing_weights`` of one dtype.
        gate_up: ``[E, 2I, H]``, contiguous or a transposed view of a contiguous ``[E, H, 2I]``.
        down: ``[E, H, I]``, likewise.
        routing_weights: ``[T, K]``, any floating dtype.
        gate_up_a, gate_up_b: ``[E, r1, H]`` and ``[E, 2I, r1]``, the scaling already in ``b``, or None.
        down_a, down_b: ``[E, r2, I]`` and ``[E, H, r2]``, or None.
        gate_up_bias, down_bias: ``[E, 2I]`` and ``[E, H]``, or None.
        order, offsets: ``[S]`` and ``[E + 1]``, the fields of a :class:`scattermoe_lora.ops.routing.Routing`.
        activation, interleaved, alpha, limit, shift: The fields of a :class:`scattermoe_lora.ops.activation.Gate`.
        sentinels: Whether an index ``>= E`` is a pair without an expert here, or an error (seen on the CPU alone).
        keep: Whether to return what the backward needs; otherwise the last three results are empty.

    Returns:
        The output ``[T, H]``; then in sorted order the gate/up projection ``[S, 2I]`` and the low-rank intermediates
        ``x A^T`` of both projections, ``[S, r1]`` and ``[S, r2]``.
    """
    refuse_index_outside(order, offsets, sentinels)
    arguments = (x, gate_up, down, routing_weights, order, offsets)
    optional = (gate_up_a, gate_up_b, down_a, down_b, gate_up_bias, down_bias)
    gate = Gate(activation, interleaved, alpha, limit, shift)
    with dispatch.undisturbed(x):
        if dispatch.use_triton(x):
            from . import gpu

            return gpu.forward(*arguments, *optional, gate, keep)
        return cpu.forward(*arguments, *optional, gate, keep)


@experts_forward.register_fake
def _(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    order: torch.Tensor,
    offsets: torch.Tensor,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    shift: float,
    sentinels: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    kept = order.shape[0] if keep else 0
    return (
        x.new_empty(x.shape),
        x.new_empty((kept, gate_up.shape[1])),
        x.new_empty((kept, 0 if gate_up_a is None else gate_up_a.shape[1])),
        x.new_empty((kept, 0 if down_a is None else down_a.shape[1])),
    )


@torch.library.custom_op("scattermoe_lora::experts_backward", mutates_args=())
def experts_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    order: torch.Tensor,
    offsets: torch.Tensor,
    hidden: torch.Tensor,
    low1: torch.Tensor,
    low2: torch.Tensor,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    shift: float,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of :func:`experts_forward`.

    Args:
        grad_out: ``[T, H]``.
        hidden, low1, low2: What the forward kept.
        needs: One flag for each of the first ten arguments of the forward.

    Returns:
        The gradients that ``needs`` asks for, in the order of those arguments. With ``gate_up`` and ``down`` frozen
        nothing of their size is allocated.
    """
    arguments = (grad_out, x, hidden, low1, low2, gate_up, down, routing_weights, order, offsets)
    optional = (gate_up_a, gate_up_b, down_a, down_b, gate_up_bias, down_bias)
    gate = Gate(activation, interleaved, alpha, limit, shift)
    with dispatch.undisturbed(x):
        if dispatch.use_triton(x):
            from . import gpu

            gradients = gpu.backward(*arguments, *optional, gate, needs)
        else:
            gradients = cpu.backward(*arguments, *optional, gate, needs)
    return [g for g in gradients if g is not None]


@experts_backward.register_fake
def _(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    order: torch.Tensor,
    offsets: torch.Tensor,
    hidden: torch.Tensor,
    low1: torch.Tensor,
    low2: torch.Tensor,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    shift: float,
    needs: list[bool],
) -> list[torch.Tensor]:
    factors = (gate_up_a, gate_up_b, down_a, down_b)
    inputs = (x, gate_up, down, routing_weights, *factors, gate_up_bias, down_bias)
    return [empty_gradient(t) for t, need in zip(inputs, needs, strict=True) if need and t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, keep = inputs[:12] + inputs[-1:]
    ctx.gate = inputs[12:17]
    assert keep, "autograd needs what only keep=True returns"
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 19
    saved = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:10]]
    gradients = iter(experts_backward(grad_out.contiguous(), *saved, *ctx.gate, needs))
    return (*(next(gradients) if need else None for need in needs), *(None,) * 9)


experts_forward.register_autograd(_backward, setup_context=_setup_context)
