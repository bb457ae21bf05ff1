"""Every experts class of the installed transformers, found in it and built small."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers.models
from transformers import PretrainedConfig

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 4, 2, 24, 16

# How configurations call the sizes of an experts layer. Whatever else a class reads has its model's own default.
_SIZES = {
    "experts": r"(n_routed|num(_local)?|moe_num)_experts",
    "hidden": r"(moe_)?(hidden|latent|input)_size",
    "intermediate": r"(\w+_)?(intermediate|ffn_hidden)_size",
}


class TinyConfig:
    """A configuration that answers what an experts class asks: small sizes, its own model's defaults for the rest."""

    def __init__(self, module: Any, **sizes: int) -> None:
        self._module = module
        self._sizes = sizes
        self._experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        for size, pattern in _SIZES.items():
            if re.fullmatch(pattern, name):
                return self._sizes[size]
        for value in vars(self._module).values():
            if (
                inspect.isclass(value)
                and issubclass(value, PretrainedConfig)
                and value is not PretrainedConfig
            ):
                config = value()
                if hasattr(config, name):
                    return getattr(config, name)
        raise AttributeError(f"no size rule and no default for the configuration's {name}")


def _modules() -> list[Any]:
    """The modeling modules that decorate a class with ``use_experts_implementation``, and no others: they are slow."""
    folder = Path(transformers.models.__path__[0])
    return [
        importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for file in sorted(folder.glob("*/modeling_*.py"))
        if re.search(r"^@use_experts_implementation", file.read_text(), re.MULTILINE)
    ]


def experts_classes() -> dict[str, type[torch.nn.Module]]:
    """The classes whose forward goes through the ``ExpertsInterface``, by name."""
    return {
        name: value
        for module in _modules()
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, torch.nn.Module)
        and value.__module__ == module.__name__
        and _is_decorated(value)
    }


def _is_decorated(cls: type[torch.nn.Module]) -> bool:
    forward = vars(cls).get("forward")
    return (
        hasattr(forward, "__wrapped__") and "experts_interface" in inspect.getclosurevars(forward).nonlocals
    )


def build(
    cls: type[torch.nn.Module],
    dtype: torch.dtype = torch.float64,
    experts: int = EXPERTS,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
) -> Any:
    """A small instance with random weights."""
    config = TinyConfig(inspect.getmodule(cls), experts=experts, hidden=hidden, intermediate=intermediate)
    module = cls(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module.to(dtype)
