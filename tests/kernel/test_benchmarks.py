"""The benchmarks run: under the runner of ``kernels benchmark``, and as the comparison that prints a table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kernels.cli.benchmark import discover_benchmark_classes, run_benchmark_class

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "benchmark_experts.py"
WORKLOADS = {"Decode": "forward", "Prefill": "forward", "Training": "step"}


@pytest.fixture(scope="module")
def classes():
    return {each.__name__: each for each in discover_benchmark_classes(SCRIPT, REPOSITORY)}


@pytest.fixture
def run(kernel):
    """``run(cls)``: one timed iteration of a benchmark on the built kernel."""
    directory = os.environ["LOCAL_KERNELS"].partition("=")[2]
    return lambda cls: run_benchmark_class(cls, 1, 0, str(Path(directory).parent), True, "local")[0]


@pytest.mark.parametrize("name", WORKLOADS)
def test_kernels_benchmark_runs_and_verifies_every_workload(classes, run, name) -> None:
    assert set(classes) == set(WORKLOADS)
    (timing,) = run(classes[name]).values()
    assert timing.verified is True
    assert timing.mean_ms > 0
    assert timing.ref_mean_ms > 0


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_kernel_that_leaves_out_the_adapter_does_not_verify(classes, run, name) -> None:
    class Wrong(classes[name]):
        def eager(self):
            return self.plain(self.x, self.index, self.weights)

    with pytest.raises(RuntimeError, match=f"Verification failed for {WORKLOADS[name]}"):
        run(Wrong)
