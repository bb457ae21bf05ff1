"""A sum of the tokens' losses as a torch operator that computes its gradients on the way, while logits are at hand."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..operator import computation, eager, flattened, names_needed, register_autograd
from .arguments import DIFFERENTIABLE, Objective, Operands, Settings, Statistics
from .op import compute_gradients

_TENSORS = len(Operands._fields)
_FACTORS = len(Objective._fields)
# The sum, the statistics that have a gradient, and the gradients.
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]


def _implementation(x: torch.Tensor) -> Any:
    if dispatch.use_triton(x):
        from . import gpu_total

        return gpu_total
    from . import cpu_total

    return cpu_total


def _kept_dtype(operand: torch.Tensor) -> torch.dtype:
    """A gradient's dtype until the backward: not float16, which is too small for a sum over tokens not divided yet."""
    return torch.float32 if operand.dtype == torch.float16 else operand.dtype


@torch.library.custom_op("scattermoe_lora::linear_cross_entropy_total", mutates_args=())
@computation
def linear_cross_entropy_total(
    operands: Operands, objective: Objective, settings: Settings, needs: list[bool]
) -> Result:
    """The sum of ``objective`` over the tokens, and what it and its derivative are made of.

    Args:
        operands, settings: As of :func:`.op.linear_cross_entropy_forward`; ``peaks`` and ``pulls`` are off.
        objective: Factors of the terms of each token's loss.
        needs: One flag each for ``hidden``, ``weight``, ``bias``, ``low`` and ``b``: whether to compute its gradient.

    Returns:
        The sum, ``[]``; the first four :class:`Statistics`; and the gradients of the sum by those that ``needs`` flags,
        in their dtype, or float32 for float16; sums in float32, rounded once. The same input gives the same bits.
    """
    names = names_needed(operands, needs)
    statistics, gradients = _implementation(operands.hidden).forward(operands, objective, settings, names)
    losses = objective.by_token(statistics, operands.class_weight, operands.weight.shape[0])
    lse, label_logit, logit_sum, entropy, *_ = statistics
    kept = [gradients[name].to(_kept_dtype(getattr(operands, name))) for name in names]
    return losses.sum(), lse, label_logit, logit_sum, entropy, kept


@linear_cross_entropy_total.register_fake
@flattened
def _(operands: Operands, objective: Objective, settings: Settings, needs: list[bool]) -> Result:
    tokens = operands.hidden.shape[0]
    counts = (tokens, tokens, tokens if settings.sums else 0, tokens if settings.entropies else 0)
    own = [getattr(operands, name) for name in names_needed(operands, needs)]
    lse, label_logit, logit_sum, entropy = (objective.own.new_empty((count,)) for count in counts)
    kept = [torch.empty_like(operand, dtype=_kept_dtype(operand)) for operand in own]
    return objective.own.new_empty(()), lse, label_logit, logit_sum, entropy, kept


@torch.library.custom_op("scattermoe_lora::linear_cross_entropy_scale", mutates_args=())
def linear_cross_entropy_scale(
    factor: torch.Tensor, gradients: list[torch.Tensor], operands: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Each of ``gradients`` times a number, in the dtype of its operand."""
    return [
        (gradient * factor).to(operand.dtype) for gradient, operand in zip(gradients, operands, strict=True)
    ]


@linear_cross_entropy_scale.register_fake
def _(
    factor: torch.Tensor, gradients: list[torch.Tensor], operands: list[torch.Tensor]
) -> list[torch.Tensor]:
    return [torch.empty_like(operand) for operand in operands]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    _, *statistics, kept = output
    ctx.settings, ctx.needs = inputs[_TENSORS + _FACTORS : -1], inputs[-1]
    ctx.save_for_backward(*inputs[: _TENSORS + _FACTORS], *statistics, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_total: torch.Tensor | None, *incoming: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, rest = saved[:_TENSORS], saved[_TENSORS + _FACTORS :]
    operands, objective = Operands(*tensors), Objective(*saved[_TENSORS : _TENSORS + _FACTORS])
    *d_statistics, _ = incoming
    own, kept = rest[: len(d_statistics)], rest[len(d_statistics) :]
    missing = [operands.hidden.new_empty(0), operands.hidden.new_empty((0, 0))]
    statistics = Statistics._make((*own, *missing))
    names = names_needed(operands, ctx.needs)
    result: list[Any] = [None] * len(ctx.needs_input_grad)
    wanted = [bool(need) for need in ctx.needs_input_grad[:DIFFERENTIABLE]]
    if d_total is not None:
        computed = dict(zip(names, kept, strict=True))
        chosen = [name for name in names_needed(operands, wanted) if name in computed]
        sources = [getattr(operands, name) for name in chosen]
        scaled = _scaled(d_total, [computed[name] for name in chosen], sources)
        for name, gradient in zip(chosen, scaled, strict=True):
            result[Operands._fields.index(name)] = gradient
        terms = objective.terms(statistics, operands.class_weight, operands.weight.shape[0])
        for place, term in enumerate(terms, _TENSORS):
            result[place] = None if term is None or not ctx.needs_input_grad[place] else d_total * term
    if any(gradient is not None for gradient in d_statistics):
        more = iter(compute_gradients(*d_statistics, *tensors, *statistics, *ctx.settings, wanted))
        for place, need in enumerate(wanted):
            if need:
                gradient = next(more)
                result[place] = gradient if result[place] is None else result[place] + gradient
    return tuple(result)


def _scaled(
    factor: torch.Tensor, gradients: list[torch.Tensor], operands: list[torch.Tensor]
) -> list[torch.Tensor]:
    # On a CPU it costs nothing to see that nothing has to be done; a loss of its own is multiplied by 1.
    is_plain = type(factor) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(factor)
    if is_plain and factor.device.type == "cpu" and not torch.is_grad_enabled() and float(factor) == 1:
        return [gradient.to(operand.dtype) for gradient, operand in zip(gradients, operands, strict=True)]
    scaled: list[torch.Tensor] = _scale(factor, gradients, operands)
    return scaled


_scale = eager(linear_cross_entropy_scale)
forward = register_autograd(linear_cross_entropy_total, _backward, _setup_context)
dispatch.refuse_second_derivative("linear_cross_entropy", linear_cross_entropy_scale)
