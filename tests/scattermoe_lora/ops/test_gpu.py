"""The Triton kernels on a GPU pass the tests that the native CPU code passes, with every tensor made on the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_tests import CHOSEN, MODULES

TESTS = Path(__file__).parents[1]


def run_on(device: str, module: str, *options: str, chosen: str = CHOSEN) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *options,
        "-k",
        chosen,
        str(TESTS / module),
    ]
    environment = {**os.environ, "KERNEL_TESTS_DEVICE": device}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("module", MODULES)
def test_triton_passes_the_same_tests_on_a_gpu(module: str) -> None:
    done = run_on("cuda", module)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_every_module_has_tests_for_a_gpu_and_there_is_time_for_all() -> None:
    # As of a GPU, but none is run.
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-k", CHOSEN]
    process = subprocess.run(
        [*command, *(str(TESTS / module) for module in MODULES)],
        env={**os.environ, "KERNEL_TESTS_DEVICE": "cuda"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    tests = [line.partition("::")[0] for line in process.stdout.splitlines() if "::" in line]
    assert [module for module in MODULES if not any(path.endswith(module) for path in tests)] == []
    assert len(tests) <= 250


def test_float64_which_no_triton_kernel_takes_is_not_asked_of_a_gpu() -> None:
    code = (
        "import torch, test_attention as a, test_norm_rotary as n; "
        "print(a.EXACT, torch.float64 in n.TOLERANCE, torch.bfloat16 in n.TOLERANCE)"
    )
    environment = {
        **os.environ,
        "KERNEL_TESTS_DEVICE": "cuda",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS / 'ops'}",
    }
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == ["torch.float32", "False", "True"]


def test_the_device_asked_for_is_where_tensors_are_made() -> None:
    # Nothing can be computed on "meta": a test that passed there would not have looked at the device.
    # Many fail, and to say why takes longer than all else.
    done = run_on("meta", "ops/test_grouped_linear.py", "--tb=no", chosen="reference")
    assert done.returncode == 1
    assert " failed" in done.stdout
    assert " passed" not in done.stdout.splitlines()[-1]
