"""Statistics of the logits of hidden states as a torch operator, with a fake implementation and autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import dispatch
from ..operator import by_argument, computation, eager, flattened, names_needed, register_autograd
from ..routing import empty_gradient
from . import cpu
from .arguments import DIFFERENTIABLE, Operands, Settings, Statistics, StatisticsGradients

_TENSORS = len(Operands._fields)


def _implementation(x: torch.Tensor) -> Any:
    if dispatch.use_triton(x):
        from . import gpu

        return gpu
    return cpu


@torch.library.custom_op("scattermoe_lora::linear_cross_entropy_forward", mutates_args=())
@computation
def linear_cross_entropy_forward(
    operands: Operands, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:class:`Statistics` of ``logits = cap(scale * (hidden W^T + low B^T + bias))``, which are never all in memory."""
    result: Statistics = _implementation(operands.hidden).forward(operands, settings)
    return (*result,)


@linear_cross_entropy_forward.register_fake
@flattened
def _(
    operands: Operands, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = operands.hidden
    tokens, width = hidden.shape
    asked = (True, True, settings.sums, settings.entropies, settings.peaks)
    lse, label_logit, logit_sum, entropy, peak = (
        hidden.new_empty((tokens if own else 0,), dtype=operands.wide) for own in asked
    )
    pulls = tokens if settings.pulls else 0
    return lse, label_logit, logit_sum, entropy, peak, hidden.new_empty((pulls, width))


@torch.library.custom_op("scattermoe_lora::linear_cross_entropy_backward", mutates_args=())
@computation
def linear_cross_entropy_backward(
    gradients: StatisticsGradients,
    operands: Operands,
    statistics: Statistics,
    settings: Settings,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of :func:`linear_cross_entropy_forward`; sums in float32, rounded once.

    Args:
        gradients: Of the statistics.
        operands, settings: As in the forward.
        statistics: Its results.
        needs: One flag each for ``hidden``, ``weight``, ``bias``, ``low`` and ``b``.

    Returns:
        Of these the ones asked for, each in its argument's dtype. The same input gives the same bits.
    """
    names = names_needed(operands, needs)
    result = _implementation(operands.hidden).backward(gradients, operands, statistics, settings, names)
    return [result[name] for name in names]


@linear_cross_entropy_backward.register_fake
@flattened
def _(
    gradients: StatisticsGradients,
    operands: Operands,
    statistics: Statistics,
    settings: Settings,
    needs: list[bool],
) -> list[torch.Tensor]:
    return [empty_gradient(getattr(operands, name)) for name in names_needed(operands, needs)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.settings = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.mark_non_differentiable(*output[len(StatisticsGradients._fields) :])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:DIFFERENTIABLE]]
    own = gradients[: len(StatisticsGradients._fields)]
    if all(gradient is None for gradient in own):
        return (None,) * len(ctx.needs_input_grad)
    return by_argument(ctx, compute_gradients(*own, *ctx.saved_tensors, *ctx.settings, needs), needs)


compute_gradients = eager(linear_cross_entropy_backward)
forward = register_autograd(linear_cross_entropy_forward, _backward, _setup_context)
dispatch.refuse_second_derivative("linear_cross_entropy", linear_cross_entropy_backward)
