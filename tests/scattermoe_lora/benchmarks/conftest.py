"""The benchmarks' modules, which are scripts beside the packages."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def gpu():
    """``gpu("card")``: a module of ``benchmarks/gpu``."""

    def load(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch:
            for folder in ("torch-ext", "benchmarks"):
                patch.syspath_prepend(REPOSITORY / folder)
            return importlib.import_module(f"gpu.{name}")

    return load
