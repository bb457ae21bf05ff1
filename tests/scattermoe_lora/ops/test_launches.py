"""The smallest inputs give launches that Triton compiles for a GPU, with none at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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


def test_launches_with_sizes_of_one_compile(kernel: ModuleType) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    assert set(process.stdout.split()) == KERNELS
