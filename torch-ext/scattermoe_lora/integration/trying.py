"""Modules run on numbers of ours, to see what they compute: their class may have any name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

# Steps of 37 in 128 put values of every sign and size beside each other.
_STEPS = (torch.arange(128, device="cpu") * 37 % 128).to(torch.float32)


def probe(dtype: torch.dtype, shift: float = 0.0) -> torch.Tensor:
    """``[4, 128]`` numbers of every size and sign, on the CPU; others with another ``shift``."""
    sizes = torch.tensor([1e-2, 8.0, 1e2, 1e4], device="cpu").unsqueeze(-1)
    return (((_STEPS + shift) % 128 / 64 - 1) * sizes).to(dtype)


def twin(
    module: torch.nn.Module, children: Mapping[str, Any], parameters: Mapping[str, torch.Tensor]
) -> torch.nn.Module:
    """A module of the same class and settings with other children and parameters; without hooks it is called as
    ``type(twin).forward(twin, ...)``."""
    # In training, so that dropout is seen.
    other = module.__new__(type(module))
    other.__dict__ = {
        **module.__dict__,
        "training": True,
        "_modules": dict(children),
        "_parameters": {name: torch.nn.Parameter(value, False) for name, value in parameters.items()},
    }
    return other


def candidates(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules of ``model`` with their names, without scripts, whose forward takes no other children."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def succeeds(trial: Callable[[], bool]) -> bool:
    """The result of ``trial``, and False where it fails: whatever another class's forward does, it is not known."""

    @torch.no_grad()
    def run() -> bool:
        try:
            # Of dtypes that the model does not have. Its dropout leaves the generator as it was.
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return trial()
        except Exception:  # noqa: BLE001 - code of any class
            return False

    # In a thread of its own no mode of the caller's is on: under fake tensors, or with the meta device as the default,
    # there would be no numbers to compare.
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(run).result()
