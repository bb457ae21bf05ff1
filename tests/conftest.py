"""Settings that make a commit pass or fail alike wherever it is tested: the same examples, patience with busy machines.

``make fuzz`` looks for new examples.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import os
import sys
from collections.abc import Generator
from pathlib import Path

import httpx2
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

TESTS = Path(__file__).parent
# Tests import what helps them from beside them and from the folders above.
sys.path[:0] = sorted({str(path.parent) for path in TESTS.rglob("*.py")})

if os.environ.get("TRITON_INTERPRET") == "1":
    # Triton's interpreter runs each program in numpy, one after the other.
    examples = 6
elif os.environ.get("KERNEL_TESTS_DEVICE", "cpu") != "cpu":
    # Of each new shape on a GPU, some ten kernels are compiled.
    examples = 12
else:
    examples = 40
settings.register_profile("random", max_examples=examples, deadline=None)
settings.register_profile(
    "repeatable",
    settings.get_profile("random"),
    derandomize=True,
    # Measures the machine.
    suppress_health_check=[HealthCheck.too_slow],
)
# Before the modules of tests, whose own settings begin with these; --hypothesis-profile comes later still.
settings.load_profile("repeatable")


# Of the constants in imported modules, hypothesis makes examples too; which modules those are depends on the tests that
# ran before in the same process. It has no setting for this.
_local_constants = providers._get_local_constants
providers._get_local_constants = lambda: (
    providers._local_constants if settings.default.derandomize else _local_constants()
)

# A Hub that does not answer fails its test all the same, a little later than by these libraries' 5 and 10 seconds.
# Processes that tests start take over the variables; huggingface_hub reads them when it is imported.
_PATIENCE = 120
for _name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
    os.environ.setdefault(_name, str(_PATIENCE))
_shared = inspect.signature(httpx2.request).parameters["timeout"].default
_shared.connect = _shared.read = _shared.write = _shared.pool = _PATIENCE

# Threads that wait for one another spin by default: fast where each has a core, and several times slower where two
# workers, or other work, share the cores. libgomp reads this when torch is imported, here and in processes of tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# In the end everything is collected, or extension modules report what is left as leaks of theirs.
atexit.register(gc.unfreeze)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from what imports leave: looking through it took an eighth of all time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# Tests that take long by themselves.
LONGEST = (
    "test_interpreter.py", "test_gpu_run.py", "test_libraries.py", "test_demo.py", "test_recipes.py", "test_release.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files, then those of the kernel package, so that no worker has one left at the end."""
    items.sort(key=lambda item: (item.path.name not in LONGEST, "scattermoe_lora" not in item.path.parts))
