"""Parts of a model that run fused: one call on a model, and one that undoes it."""

from __future__ import annotations

import torch

from .fused_classes import Part, Target
from .gemma4 import attention
from .loss import forward as loss
from .mlp import forward as mlp
from .norm import forward as norm
from .projections import part as projections

_PARTS = (attention.PART, mlp.PART, norm.PART, projections.PART, loss.PART)


def apply_to(model: torch.nn.Module, *parts: str) -> int:
    """Runs parts of ``model`` fused.

    ============= ====================================================================================================
    part          what runs fused
    ============= ====================================================================================================
    "attention"   the norms and the rotary embedding in every text attention layer of Gemma 4, see
                  :mod:`scattermoe_lora.integration.gemma4.attention`
    "mlp"         every gated MLP, between its projections, and safe in float16, see
                  :mod:`scattermoe_lora.integration.mlp.forward`
    "norm"        every RMSNorm, see :mod:`scattermoe_lora.integration.norm.forward`
    "projections" PEFT's LoRA on linear layers, see :mod:`scattermoe_lora.integration.projections.part`
    "loss"        ``model(..., labels=...)`` of causal language models with a linear head, without their logits, see
                  :mod:`scattermoe_lora.integration.loss.forward`
    ============= ====================================================================================================

    Parameters, buffers and ``state_dict`` stay as they are. Modules become instances of a subclass of theirs. That is
    part of a copy, deep or shallow (``nn.DataParallel``'s replicas), which runs on its weights, and not of a pickle,
    which needs this kernel then no more than the model did before. Calling it again does nothing.

    Args:
        model: A model, or part of one: multimodal, wrapped by PEFT, sharded.
        parts: Their names. Without any, ``"attention"``. The others are asked for: with them a model differs to the
            code around it (no logits beside the loss, MLPs that clamp in float16).

    Returns:
        The number of modules in ``model`` that run these parts fused.

    Raises:
        ValueError: A name of no part, or the model has nothing of a part.
        NotImplementedError: A module has another forward than transformers' (a subclass, another library, another
            version of transformers); the message names it. Nothing is changed then.
    """
    chosen = _chosen("apply_to", parts or (attention.PART.name,))
    targets = [_targets(part, model) for part in chosen]
    missing = [part for part, found in zip(chosen, targets, strict=True) if not found]
    if missing:
        needs = "; or ".join(part.needs for part in missing)
        raise ValueError(f"apply_to: expected a model with {needs}, got a {type(model).__name__} without")
    own = [target for found in targets for target in found]
    for target in own:
        target.fuse()
    return len(own)


def remove_from(model: torch.nn.Module, *parts: str) -> int:
    """Undoes :func:`apply_to`, for these parts or for all. Where it was not called, or undone already, nothing is done.

    Returns:
        The number of modules that ran fused.

    Raises:
        ValueError: A name of no part.
        NotImplementedError: A fused module's class was subclassed since then; the message names it. Nothing is changed.
    """
    chosen = _chosen("remove_from", parts)
    fused = [target for part in chosen for target in part.targets(model, False) if target.is_fused]
    for target in fused:
        target.check_removable()
    for target in fused:
        target.restore()
    return len(fused)


def _chosen(caller: str, names: tuple[str, ...]) -> list[Part]:
    for name in names:
        if name not in {part.name for part in _PARTS}:
            expected = ", ".join(repr(part.name) for part in _PARTS)
            raise ValueError(f"{caller}: parts: expected some of {expected}, got {name!r}")
    return [part for part in _PARTS if not names or part.name in names]


def _targets(part: Part, model: torch.nn.Module) -> list[Target]:
    targets = list(part.targets(model, True))
    for target in targets:
        target.check()
    return targets
