"""The experts implementation that transformers calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...ops.dispatch import refuse_transforms
from ...ops.experts.arguments import Operands
from ...ops.experts.op import experts as fused_experts
from ...ops.float8.products import with_weight_gradient
from ...ops.float8.weight import Float8Weight
from ...ops.grouped_linear.adapters import Adapter, Update, combine, finish
from ...ops.grouped_linear.arguments import Operands as LinearOperands
from ...ops.grouped_linear.op import linear
from ...ops.quantization.stack import Weight
from ...ops.routing import Routing, sort_by_expert
from .checks import LowRank, check_inputs
from .expert_parallel import handed_factors
from .module import fused_gate, read_weights


def experts_forward(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    lora: Mapping[str, LowRank] | None = None,
    adapters: Mapping[str, Sequence[Adapter]] | None = None,
) -> torch.Tensor:
    """Forward of a transformers experts module, the signature that its ``ExpertsInterface`` calls.

    Args:
        module: An experts module (its class carries ``@use_experts_implementation``), of any layout.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]``, int32 or int64. Values ``>= E`` are the sentinels of expert parallelism and cost no
            work; where the module is not expert-parallel they are an error (which a GPU does not look for).
        top_k_weights: ``[T, K]``, floating point.
        lora: Low-rank factors by parameter name; the PEFT integration passes them.
        adapters: Instead of ``lora``, for parameters whose adapters have settings beyond factors; likewise.

    Returns:
        ``[T, H]``, dtype of ``hidden_states``.

    Raises:
        NotImplementedError: The module has not the parameters that its layout flags promise, or the kernels do not
            compute in their dtype; forward-mode differentiation, ``torch.func.grad`` and second derivatives.
        ValueError: Shapes, dtypes, devices or scales that do not fit together; the message names argument, expected
            and got.
    """
    experts: Any = module
    weights = read_weights(experts)
    if not lora and not adapters:
        lora, adapters = handed_factors(experts)
    check_inputs(weights, hidden_states, top_k_index, top_k_weights, lora or {})
    up, down = weights.up, weights.down
    first = _update(weights.up_name, up, weights.up_bias, lora, adapters)
    second = _update("down_proj", down, weights.down_bias, lora, adapters)
    dense = (tensor for tensor in (up, down) if isinstance(tensor, torch.Tensor))
    refuse_transforms("experts_forward", hidden_states, top_k_weights, *dense, *first[:4], *second[:4])
    a1, b1, bias1 = first[:3]
    a2, b2, bias2 = second[:3]
    order, offsets = sort_by_expert(top_k_index, down.shape[0])
    # Before transformers 5.18 no module says so, and sentinels may come to any.
    sentinels = getattr(experts, "_is_expert_parallel", True)
    # Under autocast the hidden states can come in float32 to weights in bfloat16; the weights' dtype decides, as in
    # transformers' own grouped_mm.
    x = hidden_states.to(up.dtype).contiguous()
    gate = fused_gate(experts)
    trained = _trained(experts, weights.up_name), _trained(experts, "down_proj")
    if gate is not None and not first.terms and not second.terms and trained == (None, None):
        operands = Operands(x, up, down, top_k_weights, a1, b1, a2, b2, bias1, bias2, order, offsets)
        keep = torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in operands)
        out, *_ = fused_experts(operands, gate, sentinels, keep)
        return out.to(hidden_states.dtype)

    tokens, top_k = top_k_index.shape
    h, _ = linear(LinearOperands(x, up, a1, b1, bias1, order, offsets), top_k, sentinels)
    h = _with_gradient(h, x, trained[0], experts, Routing(order, offsets), top_k)
    h = finish(first, h, x, order, offsets, top_k)
    h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
    h = h.to(down.dtype).contiguous()
    y, _ = linear(LinearOperands(h, down, a2, b2, bias2, order, offsets), top_k, sentinels)
    y = _with_gradient(y, h, trained[1], experts, Routing(order, offsets), top_k)
    y = finish(second, y, h, order, offsets, top_k)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    weighted = y.view(tokens, top_k, y.shape[-1]) * top_k_weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _update(
    name: str,
    weight: Weight,
    bias: torch.Tensor | None,
    lora: Mapping[str, LowRank] | None,
    adapters: Mapping[str, Sequence[Adapter]] | None,
) -> Update:
    if adapters and name in adapters:
        return combine(adapters[name], weight, bias)
    if not lora or name not in lora:
        return Update(None, None, bias)
    a, b = lora[name]
    return Update(a.contiguous(), b.contiguous(), bias)


def _trained(module: Any, name: str) -> Float8Weight | None:
    """The module's parameter if it is trained in float8, whose gradient the operators do not make."""
    parameter = module._parameters.get(name)
    return parameter if isinstance(parameter, Float8Weight) and parameter.requires_grad else None


def _with_gradient(
    y: torch.Tensor, x: torch.Tensor, weight: Float8Weight | None, module: Any, routing: Routing, top_k: int
) -> torch.Tensor:
    if weight is None:
        return y
    return with_weight_gradient(y, x, weight, routing, top_k, module.is_transposed)
