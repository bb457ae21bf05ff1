"""Kernel tests load what users load: the built artifact, through ``get_kernel``."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bits import same_bits
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


@pytest.fixture
def quantization(submodule):
    """``quantization("float8")``: a module of ``ops/quantization``."""
    return lambda name: submodule(f"ops.quantization.{name}")


@pytest.fixture
def decoded(quantization, monkeypatch):
    """``decoded(stack)``: all matrices as the oracle decodes them, after the fast ways gave the same bits."""

    def decode(stack: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        stack = quantization("stack").QuantizedStack.from_operands(*stack.operands(), stack.dtype)
        exact = quantization("reference").decode(stack, dtype)
        for installed in {False, quantization("cpu").has_bitsandbytes()}:
            with monkeypatch.context() as patch:
                patch.setattr(quantization("cpu"), "has_bitsandbytes", lambda i=installed: i)
                assert same_bits(quantization("decode").decode(stack, slice(None), dtype=dtype), exact)
        chosen = list(range(stack.shape[0]))[::-2]
        out = exact.new_empty((len(chosen), *stack.stored_shape[1:]))
        assert same_bits(quantization("decode").decode(stack, chosen, out=out), exact[chosen])
        return exact

    return decode
