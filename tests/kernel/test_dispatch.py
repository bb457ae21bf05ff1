"""Where and in what surroundings an operator computes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def test_kernels_launch_on_the_tensors_device_and_without_autocast(
    submodule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[int] = []

    class Watched:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *_: object) -> None:
            entered.append(-1)

    monkeypatch.setattr(torch.accelerator, "device_index", Watched)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    # Without a GPU torch.autocast("cuda") warns and stays off, so the CPU's stands for it below.
    with submodule("ops.dispatch").undisturbed(x):
        assert entered == [1]
    assert entered == [1, -1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with submodule("ops.dispatch").undisturbed(torch.empty(2)):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


SWITCHES = {
    "pass": "ieee",
    'torch.set_float32_matmul_precision("high")': "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    'torch.backends.cuda.matmul.fp32_precision = "tf32"': "tf32",
    'torch.backends.fp32_precision = "tf32"': "tf32",
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_float32_is_multiplied_in_full_unless_any_of_torchs_switches_allows_tf32(
    kernel: Any, switch: str
) -> None:
    # Switches of the process: each is set in one of its own.
    code = f"""
import torch
from kernels import get_kernel
kernel = get_kernel("org/scattermoe-lora", version=1)
{switch}
import importlib
gpu = importlib.import_module(kernel.__name__ + ".ops.grouped_linear.gpu")
print(gpu.float32_precision(torch.zeros(1)), gpu.float32_precision(torch.zeros(1).half()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [SWITCHES[switch], "ieee"], done.stderr
