"""Saved models with experts and their adapters, each made once for a file of tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from saved_adapters import MODELS, save


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small model of a kind, saved."""
    folder = tmp_path_factory.mktemp("bases")

    def base(kind: str) -> Path:
        if not (folder / kind).exists():
            MODELS[kind]().save_pretrained(folder / kind)
        return folder / kind

    return base


@pytest.fixture(scope="module")
def good(
    bases: Callable[[str], Path], kernel: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An adapter in both layouts, by the layout that it can be converted to."""
    folder = tmp_path_factory.mktemp("good")
    adapter = save(bases("qwen3_moe"), folder / "adapter")
    kernel.convert_adapter(adapter, folder / "served")
    return {"per_expert": adapter, "peft": folder / "served"}
