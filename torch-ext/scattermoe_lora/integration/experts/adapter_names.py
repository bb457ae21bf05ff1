"""The experts modules of an adapter's base model, and their names in the layout that servers read."""

from __future__ import annotations

import re
from typing import Any

import torch

from .adapter_files import CONFIG, TENSORS, Adapter, error
from .adapter_layouts import PROJECTIONS, Experts

_W = ("w1", "w3", "w2")
SERVED_NAMES: dict[str, tuple[tuple[str, str, str], str]] = {
    "gpt_oss": (_W, "mlp"),
    "lfm2_moe": (_W, "mlp"),
    "minimax_m2": (_W, "block_sparse_moe"),
    "mixtral": (_W, "block_sparse_moe"),
    "phimoe": (_W, "block_sparse_moe"),
}
"""Names of :data:`PROJECTIONS`, and of the module that transformers calls ``mlp``, by type of model.

These are the models whose checkpoints, and so the servers, name them in another way than most do.
"""


def base_model(adapter: Adapter, name: Any) -> torch.nn.Module:
    """The adapter's base model on the meta device, of the class in which its experts have the adapter's names."""
    import transformers

    name = adapter.config.get("base_model_name_or_path") if name is None else name
    file, key = adapter.directory / CONFIG, "base_model_name_or_path"
    expected = "a model whose configuration transformers loads (or model=)"
    if not name:
        raise error(file, key, expected, name)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise error(file, key, expected, f"{name}: {e}") from e
    kinds = [getattr(transformers, architecture, None) for architecture in config.architectures or ()]
    kinds.append(transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
    places = {match[0] for pair in adapter.pairs if (match := re.match(r".*?\bexperts\b", pair))}
    for kind in filter(None, kinds):
        with torch.device("meta"):
            base: torch.nn.Module = kind(config)
        parent = served_names(base)[1]
        if not experts_of(base).keys().isdisjoint(renamed(place, parent, "mlp") for place in places):
            return base
    got = min(places, default="factors of others alone")
    raise error(adapter.directory / TENSORS, "experts", f"modules of {name} (or pass model=)", got)


def experts_of(base: torch.nn.Module) -> dict[str, Experts]:
    """The experts modules of a model by their names."""
    return {
        path: Experts.of(path, module)
        for path, module in base.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")
    }


def served_names(base: Any) -> tuple[dict[str, str], str]:
    """A model's names of :data:`PROJECTIONS` in the per-expert layout, and of the module called ``mlp`` here."""
    config = getattr(base, "config", None)
    names, parent = SERVED_NAMES.get(getattr(config, "model_type", ""), (PROJECTIONS, "mlp"))
    return dict(zip(PROJECTIONS, names, strict=True)), parent


def renamed(name: str, module: str, other: str) -> str:
    """The name with the part ``module`` called ``other``."""
    return re.sub(rf"\b{module}\b", other, name)
