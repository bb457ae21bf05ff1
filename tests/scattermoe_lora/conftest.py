"""Kernel tests load what users load: the built artifact, through ``get_kernel``."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import INTERPRETED

REPOSITORY = Path(__file__).resolve().parents[2]

if INTERPRETED:
    import quick_interpreter

    quick_interpreter.install()


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The built kernel package."""
    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec
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
def _seed_and_device() -> Iterator[None]:
    torch.manual_seed(0)
    # Set by test_gpu.py alone.
    with torch.device(os.environ.get("KERNEL_TESTS_DEVICE", "cpu")):
        yield


@pytest.fixture
def attention(kernel: ModuleType) -> Iterator[ModuleType]:
    """The kernel, its attention registered while the test runs."""
    kernel.register_attention()
    yield kernel
    kernel.unregister_attention()


@pytest.fixture
def log_lines(
    caplog: pytest.LogCaptureFixture, submodule: Callable[[str], ModuleType]
) -> Callable[[], list[str]]:
    """``said()``: which attention ran where, by the lines of the log."""
    logger = submodule("integration.attention.backends").__name__
    caplog.set_level(logging.INFO, logger)
    return lambda: [record.getMessage() for record in caplog.records if record.name == logger]


@pytest.fixture
def bfloat16(submodule, monkeypatch) -> torch.dtype:
    """``torch.bfloat16``, which Triton's interpreter computes rightly while the test runs."""
    if INTERPRETED:
        from interpreted_bfloat16 import install

        install(monkeypatch, submodule("ops.dispatch"))
    return torch.bfloat16
