"""The experts implementation that transformers calls, and its registration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..ops.experts.op import experts_forward as fused_experts
from ..ops.grouped_linear.op import grouped_linear_forward
from ..ops.routing import sort_by_expert
from . import peft

LowRank = tuple[torch.Tensor, torch.Tensor]
"""Low-rank factors of one parameter: ``A`` ``[E, r, N_in]`` and ``B`` ``[E, N_out, r]``, the scaling in ``B``."""

_registered: set[str] = set()


def register(name: str = "scattermoe") -> None:
    """Makes ``experts_implementation=name`` available to transformers' models, with PEFT's expert LoRA fused into it.

    Nothing changes for models that use another experts implementation. Calling it again does nothing.

    Args:
        name: The name in transformers' ``ExpertsInterface``.

    Raises:
        ValueError: Another implementation stands under that name.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name == "eager" or (
        name in ALL_EXPERTS_FUNCTIONS and ALL_EXPERTS_FUNCTIONS[name] is not experts_forward
    ):
        raise ValueError(
            f"register: name: transformers already has an experts implementation {name!r}; "
            "choose another name, or unregister the build that took it"
        )
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    _registered.add(name)
    peft.hook(_registered)


def unregister() -> None:
    """Undoes every :func:`register`: transformers and PEFT are as they were. Calling it again does nothing."""
    peft.unhook()
    while _registered:
        _remove(_registered.pop())


def _remove(name: str) -> None:
    from transformers.integrations.moe import ExpertsInterface

    # The interface offers no removal of its own from the mapping that register() writes to.
    if ExpertsInterface._global_mapping.get(name) is experts_forward:
        del ExpertsInterface._global_mapping[name]


def experts_forward(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    lora: Mapping[str, LowRank] | None = None,
) -> torch.Tensor:
    """Forward of a transformers experts module, the signature that its ``ExpertsInterface`` calls.

    Args:
        module: An experts module (its class carries ``@use_experts_implementation``) with parameters
            ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]`` integers; values ``>= E`` (the sentinels of expert parallelism) cost no work.
        top_k_weights: ``[T, K]``.
        lora: Low-rank factors by parameter name; the PEFT integration passes them.

    Returns:
        ``[T, H]``, dtype of ``hidden_states``.

    Raises:
        NotImplementedError: The module's weight layout is not supported; the message names it.
    """
    experts: Any = module
    _check_layout(experts)
    gate_up, down = experts.gate_up_proj, experts.down_proj
    lora = lora or {}
    a1, b1 = lora.get("gate_up_proj", (None, None))
    a2, b2 = lora.get("down_proj", (None, None))
    order, offsets = sort_by_expert(top_k_index, down.shape[0])
    # Under autocast the hidden states can come in float32 to weights in bfloat16; the weights' dtype decides, as in
    # transformers' own grouped_mm.
    x = hidden_states.to(gate_up.dtype).contiguous()
    activation = _fused_activation(experts)
    if activation is not None:
        inputs = (x, gate_up, down, top_k_weights, a1, b1, a2, b2)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        out, *_ = fused_experts(*inputs, order, offsets, activation, keep)
        return out.to(hidden_states.dtype)

    top_k = top_k_index.shape[1]
    gate_up_out, _ = grouped_linear_forward(x, gate_up, a1, b1, order, offsets, top_k)
    hidden = experts._apply_gate(gate_up_out)
    y, _ = grouped_linear_forward(hidden.contiguous(), down, a2, b2, order, offsets, top_k)
    weighted = y.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _check_layout(module: Any) -> None:
    unsupported = [
        label
        for label, present in (
            ("transposed weights (is_transposed=True)", module.is_transposed),
            ("interleaved gate and up (is_concatenated=False)", not module.is_concatenated),
            ("biases (has_bias=True)", module.has_bias),
            ("no gate (has_gate=False)", not module.has_gate),
            ("a norm after each expert (has_post_expert_norm=True)", module.has_post_expert_norm),
        )
        if present
    ]
    if unsupported:
        raise NotImplementedError(
            f"scattermoe: {type(module).__name__} has {' and '.join(unsupported)}, which this version does not "
            'support; use experts_implementation="grouped_mm" for this model'
        )


def _fused_activation(module: Any) -> str | None:
    """The name under which the fused kernels know the module's gate, or None where it has a gate of its own."""
    from transformers import activations
    from transformers.integrations.moe import _default_apply_gate

    if type(module)._apply_gate is not _default_apply_gate:
        return None
    act_fn = module.act_fn
    if act_fn is F.silu or isinstance(act_fn, (torch.nn.SiLU, activations.SiLUActivation)):
        return "silu"
    if isinstance(act_fn, (activations.GELUTanh, activations.NewGELUActivation)):
        return "gelu_tanh"
    if act_fn is F.gelu or isinstance(act_fn, activations.GELUActivation):
        return "gelu"
    return None
