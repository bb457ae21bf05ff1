"""Attention's benchmarks run: under the runner of ``kernels benchmark``, and as the comparison that prints a table."""

from __future__ import annotations

import importlib
import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernels.cli.benchmark import discover_benchmark_classes, run_benchmark_class

REPOSITORY = Path(__file__).resolve().parents[3]
WORKLOADS = ["GlobalDecode", "GlobalPrefill", "GlobalTraining", "PackedTraining", "SlidingTraining"]


@pytest.fixture(scope="module")
def classes():
    script = REPOSITORY / "benchmarks" / "benchmark_attention.py"
    return {kind.__name__: kind for kind in discover_benchmark_classes(script, REPOSITORY)}


@pytest.fixture
def run(kernel):
    """``run(cls)``: one timed iteration of a benchmark on the built kernel."""
    directory = os.environ["LOCAL_KERNELS"].partition("=")[2]
    return lambda cls: run_benchmark_class(cls, 1, 0, str(Path(directory).parent), True, "local")[0]


@pytest.mark.parametrize("name", WORKLOADS)
def test_kernels_benchmark_runs_and_verifies_every_workload(classes, run, name: str) -> None:
    assert sorted(classes) == WORKLOADS
    (timing,) = run(classes[name]).values()
    assert timing.verified is True
    assert timing.mean_ms > 0
    assert timing.ref_mean_ms > 0


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_verifies_in_the_dtype_of_a_gpu(classes, run, monkeypatch, name: str) -> None:
    monkeypatch.setitem(classes[name].setup.__globals__["DTYPES"], "cpu", "bfloat16")
    (timing,) = run(classes[name]).values()
    assert timing.verified is True


def test_a_result_of_zeros_does_not_verify_with_as_many_tokens_as_on_a_gpu(classes, run, monkeypatch) -> None:
    tokens = classes["GlobalDecode"].setup.__globals__["TOKENS"]
    monkeypatch.setitem(tokens, "cpu", tokens["cuda"])

    class Wrong(classes["GlobalDecode"]):
        def forward(self):
            return torch.zeros_like(self.q)

    with pytest.raises(RuntimeError, match="Verification failed"):
        run(Wrong)


def test_a_kernel_that_does_not_see_the_window_does_not_verify(classes, run) -> None:
    class Wrong(classes["SlidingTraining"]):
        def forward(self):
            return self.kernel.flash_attn_func(self.q, self.k, self.v, causal=True)

    with pytest.raises(RuntimeError, match="Verification failed for step"):
        run(Wrong)


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("compare_attention")


@pytest.mark.parametrize(
    ("window", "sequences", "key_heads"), [(0, 1, 4), (5, 1, 4), (0, 3, 4), (5, 3, 4), (0, 1, 8), (5, 1, 1)]
)
def test_the_comparison_compares_the_same_thing(
    kernel, compare, window: int, sequences: int, key_heads: int
) -> None:
    case = compare.Case(20, 32, "float32", window, sequences, key_heads=key_heads)
    rows = compare.measure(kernel, case, "cpu", 0.0)
    assert list(rows) == ["scattermoe", "sdpa", "eager"]
    for row in rows.values():
        assert row["ms"] > 0
        assert row["runs"] == 3
        assert row["difference"] < 1e-5
    assert case.pairs() == compare.visible(case, "cpu").sum()


def test_what_an_implementation_refuses_is_named_and_the_others_measured(
    kernel, compare, monkeypatch
) -> None:
    def refusing(case: object, device: str) -> None:
        raise RuntimeError("no such head size\nat line 3")

    monkeypatch.setattr(compare, "sdpa", refusing)
    rows = compare.measure(kernel, compare.Case(8, 16, "float32"), "cpu", 0.0)
    assert rows["sdpa"] == {"not": "RuntimeError: no such head size"}
    assert rows["eager"]["ms"] > 0


def test_an_error_that_gives_no_reason_is_named_too(kernel, compare, monkeypatch) -> None:
    def refusing(case: object, device: str) -> None:
        raise NotImplementedError

    monkeypatch.setattr(compare, "eager", refusing)
    rows = compare.measure(kernel, compare.Case(8, 16, "float32"), "cpu", 0.0)
    assert rows["eager"] == {"not": "NotImplementedError: no reason given"}


def test_what_differs_from_the_first_is_told_and_a_refusal_of_ours_is_no_success(
    compare, monkeypatch, capsys, tmp_path
) -> None:
    row = {"peak_bytes_above_inputs": 1, "difference": 0.0, "ms": 1.0, "runs": 3}
    measured = {
        "global-1k": {"scattermoe": row, "sdpa": {**row, "difference": 0.3}},
        "sliding-2k": {"scattermoe": {"not": "Shared: out of resource"}, "sdpa": row},
    }
    cases = {case: name for name, case in compare.CASES["cpu"].items()}
    monkeypatch.setattr(compare, "measure", lambda kernel, case, *_: measured[cases[case]])
    monkeypatch.setattr(compare, "dense_rate", lambda *_: 1.0)
    monkeypatch.setattr("measuring.built_kernel", nullcontext)
    output = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["_", "--cases", "global-1k,sliding-2k", "--output", str(output)])
    with pytest.raises(SystemExit, match="scattermoe failed: sliding-2k"):
        compare.main()
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith("30% off the first")]
    assert [line.split()[0] for line in told] == ["sdpa"]
    assert json.loads(output.read_text())["results"] == measured


def test_a_case_that_our_own_kernel_refuses_is_measured_for_the_others(kernel, compare, monkeypatch) -> None:
    class Shared(Exception):
        """As Triton's own, of no kind that anybody expects."""

    def refusing(*_: object, **__: object) -> None:
        raise Shared("out of resource: shared memory")

    monkeypatch.setattr(kernel, "flash_attn_func", refusing)
    monkeypatch.setattr(kernel, "flash_attn_varlen_func", refusing)
    rows = compare.measure(kernel, compare.Case(8, 16, "float32"), "cpu", 0.0)
    assert rows["scattermoe"] == {"not": "Shared: out of resource: shared memory"}
    assert rows["eager"]["ms"] > 0


def test_an_unknown_case_is_refused_before_anything_is_measured(compare, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["compare_attention.py", "--cases", "global-1k,tiny"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "--cases: tiny: none of global-1k, " in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_ratio_of_heads_that_models_have_is_compared(compare, device: str) -> None:
    cases = [case for case in compare.CASES[device].values() if not case.window and case.sequences == 1]
    assert {case.heads // case.key_heads for case in cases} >= {1, 2, 8}
    assert any(case.key_heads == 1 for case in cases)


def test_seen_pairs_are_those_of_a_causal_window(compare) -> None:
    seen = compare.visible(compare.Case(4, 16, "float32", window=2, sequences=2), "cpu")[0, 0]
    block = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(seen, torch.block_diag(block, block).bool())
