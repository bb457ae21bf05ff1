"""Multimodal models that are trained on text alone."""

from __future__ import annotations

import torch


def freeze_towers(model: torch.nn.Module) -> int:
    """Freezes all of a multimodal model that text alone does not reach: towers, and what embeds their outputs.

    Their parameters, and adapters in them, get no gradient from a batch of text. ``DistributedDataParallel`` waits for
    those gradients, or wants ``find_unused_parameters=True``, which walks the graph at every step; frozen they are no
    part of it. Call it after PEFT, which makes all adapters of the active name trainable, and before wrapping.

    Args:
        model: A multimodal model of transformers, or one wrapped by PEFT: one of its modules has a ``language_model``
            beside its towers.

    Returns:
        The number of parameter tensors that needed a gradient and do no more.

    Raises:
        ValueError: There is no such module.
    """
    composites = [module for module in model.modules() if "language_model" in module._modules]
    if not composites:
        raise ValueError(
            "freeze_towers: expected a model with a language_model beside its towers, got a "
            f"{type(model).__name__} without"
        )
    count = 0
    for composite in composites:
        text = {id(parameter) for parameter in composite.get_submodule("language_model").parameters()}
        for parameter in composite.parameters():
            if id(parameter) not in text and parameter.requires_grad:
                parameter.requires_grad_(False)
                count += 1
    return count
