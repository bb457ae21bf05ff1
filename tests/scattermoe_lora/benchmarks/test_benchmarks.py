"""The benchmarks run: under the runner of ``kernels benchmark``, and as the comparison that prints a table."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernels.cli.benchmark import discover_benchmark_classes, run_benchmark_class

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "benchmarks" / "benchmark_experts.py"
WORKLOADS = {"Decode": "forward", "Prefill": "forward", "Training": "step"}


@pytest.fixture(scope="module")
def classes():
    return {kind.__name__: kind for kind in discover_benchmark_classes(SCRIPT, REPOSITORY)}


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
def test_every_workload_verifies_in_the_dtype_and_with_the_sizes_of_a_gpu(
    classes, run, monkeypatch, name
) -> None:
    sizes = classes[name].setup.__globals__
    monkeypatch.setitem(sizes, "CPU", replace(sizes["GPU"], experts=16, tokens=256))
    (timing,) = run(classes[name]).values()
    assert timing.verified is True


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


def test_comparison_measures_one_layer_in_a_process_of_its_own(script, kernel) -> None:
    compare = script("compare")
    tiny = compare.Shape(experts=4, hidden=32, intermediate=16, top_k=2, tokens=8, dtype="float32")
    build = Path(os.environ["LOCAL_KERNELS"].partition("=")[2])
    row = compare.run_child(tiny, "scattermoe", "cpu", build)
    assert row["ms"] > 0
    assert 0 < row["floor_ms"] < row["ms"]
    # A step of microseconds is timed for as long as a slow one.
    assert row["repeats"] > 7
    assert 0 < row["share_of_dense_rate"] < 1
    assert len(script("measuring").provenance()["commit"].removesuffix("-dirty")) == 40


def test_floor_of_a_step_is_its_products_or_its_weights(script) -> None:
    shape = script("layer").Shape(experts=4, hidden=32, intermediate=16, top_k=2, tokens=8, dtype="bfloat16")
    # Two projections of 3 * 32 * 16 numbers each expert, forward and backward, for 16 pairs.
    assert shape.floor(dense_rate=1.0, memory_rate=1e9) == 2 * 2 * 16 * 3 * 32 * 16
    assert shape.floor(dense_rate=1e9, memory_rate=1.0) == 2 * 2 * 4 * 3 * 32 * 16


def test_a_row_that_fails_leaves_the_others_and_is_no_success(script, monkeypatch, capsys, tmp_path) -> None:
    compare = script("compare")

    def run_child(shape, implementation, device, build, unpacked=None):
        if implementation == "grouped_mm":
            raise compare.RowError("grouped_mm failed")
        return {
            "ms": 1.0,
            "repeats": 7,
            "peak_bytes_above_weights": 1,
            "share_of_dense_rate": 0.5,
            "floor_ms": 0.5,
        }

    monkeypatch.setattr(compare, "run_child", run_child)
    output = tmp_path / "a" / "figures.json"
    arguments = ["--shapes", "small", "--implementations", "scattermoe,grouped_mm,eager"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, "--output", str(output)])
    with pytest.raises(SystemExit, match=r"^grouped_mm failed$"):
        compare.main()
    assert list(json.loads(output.read_text())["results"]["small"]) == ["scattermoe", "eager"]
    assert "grouped_mm    failed" in capsys.readouterr().out.splitlines()


def test_figures_are_written_after_each_row(script, monkeypatch, tmp_path) -> None:
    compare = script("compare")
    output = tmp_path / "figures.json"

    def run_child(shape, implementation, device, build, unpacked=None):
        if implementation == "eager":
            # As where the machine goes back.
            raise KeyboardInterrupt
        return {
            "ms": 1.0,
            "repeats": 7,
            "peak_bytes_above_weights": 1,
            "share_of_dense_rate": 0.5,
            "floor_ms": 0.5,
        }

    monkeypatch.setattr(compare, "run_child", run_child)
    arguments = ["--shapes", "small", "--implementations", "scattermoe,eager"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, "--output", str(output)])
    with pytest.raises(KeyboardInterrupt):
        compare.main()
    assert list(json.loads(output.read_text())["results"]["small"]) == ["scattermoe"]


@pytest.mark.parametrize("path", ["", os.environ["PATH"]], ids=["without git", "without a repository"])
def test_figures_of_a_copy_that_git_does_not_know_have_no_commit(script, monkeypatch, tmp_path, path) -> None:
    measuring = script("measuring")
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(measuring, "REPOSITORY", tmp_path)
    provenance = measuring.provenance()
    assert provenance["commit"] is None
    assert provenance["versions"]["torch"]
    assert measuring.installed("no-such-package") is None


@pytest.mark.parametrize(("least", "tried"), [(0.0, []), (0.02, [1, 2, 4, 8, 16, 32])])
def test_short_steps_are_timed_many_in_a_row(script, monkeypatch, least, tried) -> None:
    measuring = script("measuring")
    events = []

    def now() -> float:
        return 0.001 * events.count("step")

    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=now))
    seconds, runs = measuring.median_seconds(
        lambda: events.append("step"), lambda: events.append("wait"), repeats=7, least=least
    )
    assert seconds == pytest.approx(0.001)
    assert runs == 7
    in_a_row = [part.count("step") for part in "|".join(events).split("wait")[:-1]]
    assert in_a_row == [1, *tried, *(7 * (tried[-1:] or [1]))]


COMPARISONS = ["attention", "loss", "mlp", "projections", "quantized"]


@pytest.mark.parametrize(
    "name", ["benchmark_norm_rotary", "compare", *(f"compare_{part}" for part in COMPARISONS)]
)
def test_a_comparison_for_a_gpu_says_where_there_is_none(name, script, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match=r"^error: --device cuda: torch \S+ finds no GPU$"):
        script(name).main()


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


def test_quantized_weights_are_measured_against_bfloat16(script, monkeypatch, capsys, tmp_path) -> None:
    module, output = script("compare_quantized"), tmp_path / "figures.json"
    tiny = {name: module.Case(8, 64, 32, 2, 24, "float32", name) for name in module.FORMATS}
    monkeypatch.setitem(module.CASES, "cpu", tiny)
    monkeypatch.setattr(sys, "argv", ["compare_quantized.py", "--seconds", "0", "--output", str(output)])
    monkeypatch.setenv("LOCAL_KERNELS", "")
    module.main()
    results = json.loads(output.read_text())["results"]
    assert list(results) == list(module.FORMATS)
    assert all(list(rows)[:2] == ["bfloat16", module.OURS] for rows in results.values())
    # Codes, and a float32 for 64 of them or one byte for 32; a float8 matrix of this size has one block.
    elements = 8 * 3 * 64 * 32
    for name in (module.OURS, module.WITH_PEFT, module.PEFT):
        assert results["nf4"][name]["weight_bytes"] == elements / 2 + elements / 64 * 4
    assert results["nf4"][module.WITH_PEFT]["difference"] < 0.02
    assert results["mxfp4"][module.OURS]["weight_bytes"] == elements / 2 + elements / 32
    assert results["float8"][module.OURS]["weight_bytes"] == elements + 2 * 8 * 4
    told = capsys.readouterr().out
    assert "1.00x" in told
    assert "as fast as PEFT's own" in told
