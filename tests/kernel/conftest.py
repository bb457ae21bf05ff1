"""Kernel tests load what users load: the built artifact, through ``get_kernel``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch
from helpers import INTERPRETED

REPOSITORY = Path(__file__).resolve().parents[2]

# Triton's interpreter runs each program in numpy, one after the other.
hypothesis.settings.register_profile("native", max_examples=40, deadline=None)
hypothesis.settings.register_profile("interpreter", max_examples=6, deadline=None)
hypothesis.settings.load_profile("interpreter" if INTERPRETED else "native")


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The built kernel package."""
    from kernelpress.spec import load_spec
    from kernelpress.variant import build
    from kernels import get_kernel

    out = tmp_path_factory.mktemp("kernel") / "build"
    build(load_spec(REPOSITORY), out)
    os.environ["LOCAL_KERNELS"] = f"org/scattermoe-lora={out}"
    return get_kernel("org/scattermoe-lora", version=1)


@pytest.fixture
def registered(kernel: ModuleType) -> Iterator[ModuleType]:
    """The kernel, registered as ``scattermoe`` while the test runs."""
    kernel.register()
    yield kernel
    kernel.unregister()


@pytest.fixture(scope="session")
def submodule(kernel: ModuleType):
    """``submodule("ops.experts.reference")``: a module of the loaded kernel."""
    return lambda name: importlib.import_module(f"{kernel.__name__}.{name}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
