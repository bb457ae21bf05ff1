"""The Triton kernels, in Triton's interpreter, pass the tests that the native CPU code passes.

Triton decides at its import whether it interprets, so they run in a process of their own: in one for all, as what it
imports and builds takes as long as many of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
MODULES = [
    "ops/test_experts.py",
    "ops/test_grouped_linear.py",
    "ops/test_options.py",
    "ops/test_transpose.py",
    "experts/test_module.py",
    "ops/test_norm_rotary.py",
    "ops/linear_cross_entropy/test_linear_cross_entropy.py",
    "ops/test_attention.py",
    "ops/quantization/test_decode.py",
    "ops/quantization/test_operators.py",
    "ops/gated_activation/test_gated_activation.py",
    "ops/rms_norm/test_rms_norm.py",
]


def test_triton_passes_the_same_tests() -> None:
    paths = [str(TESTS / module) for module in MODULES]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *paths]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    assert "SKIPPED" not in process.stdout
    passed = [line for line in process.stdout.splitlines() if " PASSED " in line]
    assert [module for module in MODULES if not any(f"{module}::" in line for line in passed)] == []
