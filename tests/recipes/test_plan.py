"""plan.py: predictions against measured steps, sums that can be checked by hand, and what it says to bad input."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from measured_steps import REPOSITORY, config, measured_peak, predicted_peak, setup


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The built kernel package, registered."""
    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec
    from kernels import get_kernel

    out = tmp_path_factory.mktemp("kernel") / "build"
    build(load_spec(REPOSITORY), out)
    os.environ["LOCAL_KERNELS"] = f"org/scattermoe-lora={out}"
    package = get_kernel("org/scattermoe-lora", version=1)
    package.register()
    package.register_attention()
    yield package
    package.unregister_attention()
    package.unregister()


@pytest.mark.parametrize(
    ("name", "recipe", "dtype", "kernels", "checkpointing", "shape"),
    [
        ("Llama", "lora", "float32", "ours", True, (1, 128)),
        ("Llama", "full", "bfloat16", "eager", False, (2, 200)),
        ("Qwen3-MoE", "lora", "bfloat16", "ours", False, (1, 384)),
        ("Qwen3-MoE", "full", "bfloat16", "eager", True, (2, 200)),
        ("Qwen3-MoE", "full", "bfloat16", "defaults", True, (4, 100)),
        ("Mixtral", "lora", "float32", "ours", True, (2, 300)),
        ("Mixtral", "full", "float32", "ours", False, (2, 300)),
        ("gpt-oss", "lora", "float32", "ours", True, (2, 200)),
        ("Gemma 4 dense", "full", "float32", "ours", True, (2, 200)),
        ("Gemma 4 dense", "lora", "bfloat16", "eager", False, (1, 256)),
        ("Gemma 4 MoE", "lora", "bfloat16", "ours", True, (2, 200)),
        ("Gemma 4 MoE", "full", "bfloat16", "ours", False, (3, 150)),
        ("Gemma 4 E4B", "lora", "float32", "ours", True, (2, 200)),
        ("Gemma 4 E4B", "full", "bfloat16", "eager", False, (1, 200)),
    ],
)
def test_predicted_peak_is_within_a_tenth_of_the_measured_one(
    kernel: ModuleType, name: str, recipe: str, dtype: str, kernels: str, checkpointing: bool, shape: Any
) -> None:
    run = setup(name, kernels, dtype=dtype, checkpointing=checkpointing)
    predicted = predicted_peak(config(name), recipe, run, shape)
    assert predicted == pytest.approx(measured_peak(config(name), recipe, run, shape, kernel), rel=0.1)
