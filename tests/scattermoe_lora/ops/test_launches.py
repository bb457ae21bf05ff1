"""The smallest inputs give launches that Triton compiles for a GPU, with none at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "simulated_gpu.py"
KERNELS = {
    "attention_delta_kernel",
    "attention_dkdv_kernel",
    "attention_dq_kernel",
    "attention_forward_kernel",
    "count_pairs_kernel",
    "decode_kernel",
    "gate_backward_kernel",
    "gate_forward_kernel",
    "gate_up_kernel",
    "grouped_matmul_kernel",
    "grouped_outer_kernel",
    "matmul_gate_backward_kernel",
    "place_pairs_kernel",
    "quantized_matmul_kernel",
    "rotary_backward_kernel",
    "rotary_forward_kernel",
    "scaled_transpose_kernel",
    "sum_choices_kernel",
    "tile_schedule_kernel",
}


@pytest.fixture(scope="module")
def lines(kernel: ModuleType) -> list[str]:
    """What the script prints where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout.splitlines()


def test_launches_with_sizes_of_one_compile(lines: list[str]) -> None:
    assert set(lines[0].split()) == KERNELS


def test_a_second_launch_of_a_kind_is_the_one_that_triton_would_make(lines: list[str]) -> None:
    codes, *different = lines[1].split()
    assert different == []
    # Most kinds are compiled anew: the code of another would be seen.
    assert int(codes) > 10
