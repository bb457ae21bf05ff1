"""Names of the linear layers that adapters go to, where some stand inside a wrapper that PEFT does not know."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch


def lora_targets(model: torch.nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """The linear layers that patterns mean, by their full names, for ``LoraConfig(target_modules=...)``.

    PEFT refuses a pattern that meets a module it has no LoRA for, as ``q_proj`` meets ``Gemma4ClippableLinear`` in the
    towers of Gemma 4. A module that is nothing but a wrapper around one linear layer is here replaced by that layer:
    the adapter goes inside, and what the wrapper does (Gemma 4's clamps of input and output) stays around it. The names
    are of plain linear layers, so that PEFT loads the adapter later without this package.

    Args:
        model: The model before PEFT.
        patterns: As ``target_modules`` takes them: names, or ends of names (``["q_proj", "v_proj"]``); or a string, a
            regular expression that a whole name has to match.

    Returns:
        The names in the model's order.

    Raises:
        ValueError: No module matches.
    """
    names = []
    for name, module in model.named_modules():
        if not _matches(name, patterns):
            continue
        children = dict(module.named_children())
        inner = next(iter(children)) if len(children) == 1 else None
        wraps = inner is not None and isinstance(children[inner], torch.nn.Linear)
        names.append(f"{name}.{inner}" if wraps and not list(module.parameters(recurse=False)) else name)
    if not names:
        raise ValueError(f"lora_targets: expected patterns that match a module, got {patterns!r}")
    return names


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)
