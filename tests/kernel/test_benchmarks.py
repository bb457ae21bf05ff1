"""The benchmarks run: under the runner of ``kernels benchmark``, and as the comparison that prints a table."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
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


@pytest.fixture(scope="module")
def script():
    """``script(name)``: one of the scripts beside the benchmarks, imported."""

    def load(name: str):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(REPOSITORY / "benchmarks")
            patch.syspath_prepend(REPOSITORY / "torch-ext")
            return importlib.import_module(name)

    return load


def test_tuning_considers_every_launch_that_ships_and_writes_tables_as_they_are_read(script) -> None:
    tune = script("tune")
    for device in tune.tiles.available():
        found = []
        for kernel, rules in tune.tiles.load(device).rules.items():
            for rule in rules:
                candidates = list(tune.candidates(kernel, rule))
                assert all(set(each) == set(rule.launch) for each in candidates)
                if rule.launch["num_stages"] <= 4:
                    assert dict(rule.launch) in candidates
                found.append(tune.Found(kernel, rule, 1.0, dict(rule.launch), 1.0))
        file = tune.tiles.TILES / f"{device}.json"
        assert tune.render(None, found) == file.read_text()


def test_tuning_without_a_gpu_says_so() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "torch-ext"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "tune.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: tuning times kernels on a GPU, and this machine has none\n"


def test_comparison_measures_one_layer_in_a_process_of_its_own(script, kernel) -> None:
    compare = script("compare")
    tiny = compare.Shape(experts=4, hidden=32, intermediate=16, top_k=2, tokens=8, dtype="float32")
    build = Path(os.environ["LOCAL_KERNELS"].partition("=")[2])
    row = compare.run_child(tiny, "scattermoe", "cpu", build)
    assert row["ms"] > 0
    # A step of microseconds is timed for as long as a slow one.
    assert row["repeats"] > 7
    assert 0 < row["share_of_dense_rate"] < 1
    assert len(compare.provenance()["commit"].removesuffix("-dirty")) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "small,tiny"], "--shapes: tiny: none of small, medium, large"),
        (["--implementations", "fast"], "--implementations: fast: none of scattermoe, grouped_mm"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_measured(
    arguments, message, script, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    with pytest.raises(SystemExit):
        script("compare").main()
    assert message in capsys.readouterr().err
