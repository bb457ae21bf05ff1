"""Quantized weights are held to the libraries that make them, in a process that has these.

It has what ``.venv-consumer`` adds to this environment. PEFT and transformers import every such library that they
find, and all other tests would wait for that.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

TESTS = Path(__file__).parent
# The second and third take another way through the code where bitsandbytes can be imported.
PATHS = ["libraries", "ops/quantization/test_decode.py", "ops/quantization/test_matrices.py"]


def test_bitsandbytes_and_torchao_agree() -> None:
    (libraries,) = TESTS.parents[1].glob(".venv-consumer/lib/python*/site-packages")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        # This environment first, of which most is in memory already.
        "PYTHONPATH": os.pathsep.join([sysconfig.get_path("purelib"), str(libraries)]),
        # bitsandbytes asks the Hub for a kernel when it is imported.
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    process = subprocess.run(
        [*command, *(str(TESTS / path) for path in PATHS)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    assert "SKIPPED" not in process.stdout
    files = {path.name for path in TESTS.glob("libraries/test_*.py")} | {
        Path(path).name for path in PATHS[1:]
    }
    passed = [line for line in process.stdout.splitlines() if " PASSED " in line]
    assert [name for name in sorted(files) if not any(f"{name}::" in line for line in passed)] == []
