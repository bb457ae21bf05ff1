"""`make gpu` as a whole, where there is no GPU: it compiles, and times are made up."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_gpu_processes import assert_alone, runs, wait_for

REPOSITORY = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu")]


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> Path:
    """The folder of a whole run, which had more time than it took."""
    folder = tmp_path_factory.mktemp("gpu") / "run"
    process = subprocess.run(
        [*COMMAND, "--dry", "--minutes", "40", "--output", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr + logs(folder)
    return folder


def logs(folder: Path) -> str:
    return "\n".join(f"{path}: {path.read_text()[-1500:]}" for path in folder.rglob("*.log"))


@pytest.fixture(scope="module")
def results(dry) -> dict:
    return json.loads(dry.joinpath("report.json").read_text())


def test_every_stage_is_done(results) -> None:
    assert {name: stage["outcome"] for name, stage in results["stages"].items()} == dict.fromkeys(
        ("tests", "rows", "sweep", "rows again"), "done"
    )
    assert results["tests"]["passed"] == 2
    assert results["tests"]["failed"] == 0
    assert results["device"] == "made-up GPU"
    assert len(results["commit"].removesuffix("-dirty")) == 40


def test_rows_are_timed_and_say_what_the_card_was_like(results) -> None:
    rows = {(row["layer"], row["implementation"]): row for row in results["rows"]}
    # Which is not installed beside the tests.
    assert "bitsandbytes" in rows.pop(("quantized-small", "bitsandbytes + PEFT"))["refused"]
    assert set(rows) == {
        ("small", "scattermoe"),
        *(("attention-small", n) for n in ("scattermoe", "sdpa", "eager")),
        *(("loss-small", n) for n in ("scattermoe", "logits in memory")),
        *(("mlp-small", n) for n in ("scattermoe", "transformers")),
        *(("projections-small", n) for n in ("frozen", "peft", "scattermoe")),
        *(("quantized-small", n) for n in ("bfloat16", "scattermoe", "scattermoe + PEFT", "PEFT's own")),
    }
    for row in rows.values():
        assert row["ms"] > 0
        assert row["dense_tflops"] == 785
        assert row["disturbed"] is False
    assert [row["implementation"] for row in results["rows_with_new_tables"]] == ["scattermoe"]


def test_who_is_timed_is_alone_in_the_whole_run(dry, gpu) -> None:
    turns = gpu("card").read_lines(dry / "work" / "turns.jsonl")
    assert {turn["name"].partition("-")[0] for turn in turns if turn["alone"]} >= {
        "small",
        "attention",
        "sweep",
    }
    assert_alone(turns)


def test_the_sweeps_tables_load_and_the_rows_ran_with_them(dry, results, gpu) -> None:
    tables = gpu("tables")
    tiles = sys.modules["scattermoe_lora.ops.tile_tables"]
    sweep = json.loads(dry.joinpath("sweep.json").read_text())
    assert len(sweep["problems"]) == 10
    served = 0
    for problem in sweep["problems"].values():
        folder = dry / "tiles" / problem["operator"] / "tiles"
        if folder.is_dir() and problem["kernel"] in tiles.load(folder, "sm_90").rules:
            served += 1
            launch = tiles.find(folder, "sm_90", problem["kernel"], torch.bfloat16, problem["sizes"])
            assert launch == tables.fastest(problem)
            built = dry / "work" / "rows_with_new_tables-kernel" / "build"
            (file,) = built.glob(f"torch-cuda/ops/{problem['operator']}/tiles/sm_90.json")
            assert file.read_text() == folder.joinpath("sm_90.json").read_text()
    assert served >= 5


def test_the_report_is_a_page_with_pictures(dry) -> None:
    page = dry.joinpath("report.md").read_text()
    for picture in re.findall(r"\]\((\w+\.svg)\)", page):
        assert ElementTree.fromstring(dry.joinpath(picture).read_text()).tag.endswith("svg")
    assert "![Time by implementation](time.svg)" in page
    assert "![Each launch's share of the roof](roof.svg)" in page
    assert "| tests | " in page
    for kind in ("attention", "loss", "mlp", "projections", "quantized"):
        assert f"| {kind}-small | scattermoe | " in page


def test_a_stage_that_would_overrun_is_cut_and_an_interrupt_leaves_whole_files_and_no_children(
    tmp_path,
) -> None:
    begin = time.monotonic()
    # Of 12 seconds the tests have 3: too little to begin.
    process = subprocess.Popen(
        [*COMMAND, "--dry", "--minutes", "0.2", "--output", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    report = tmp_path / "report.json"
    wait_for(report.exists)
    assert json.loads(report.read_text())["stages"]["tests"]["outcome"] == "cut off"
    children = [
        int(name) for name in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert time.monotonic() - begin < 120
    wait_for(lambda: not any(runs(child) for child in children))
    assert "stages" in json.loads(report.read_text())
    assert not list(tmp_path.rglob("*.part"))


def test_tests_that_were_cut_off_are_counted_as_far_as_they_came(gpu) -> None:
    log = """
[gw0] [  1%] PASSED tests/a.py::test_one[x]
tests/a.py::test_three
[gw1] [  2%] FAILED tests/a.py::test_two
[gw1] [  3%] SKIPPED tests/a.py::test_four
"""
    told = gpu("stages").read_tests(log)
    assert told == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["tests/a.py::test_two"]}


def test_the_report_says_what_the_figures_say(gpu) -> None:
    report = gpu("report")
    rows = [
        {
            "layer": "a",
            "implementation": "scattermoe",
            "ms": 2.0,
            "tflops": 300.0,
            "peak_mb": 10,
            "disturbed": False,
        },
        {
            "layer": "a",
            "implementation": "other",
            "ms": 3.0,
            "tflops": 200.0,
            "peak_mb": 20,
            "disturbed": True,
        },
        {
            "layer": "a",
            "implementation": "other",
            "ms": 5.0,
            "tflops": 120.0,
            "peak_mb": 20,
            "disturbed": False,
        },
        {"layer": "a", "implementation": "third", "refused": "OutOfMemoryError"},
        {"layer": "norm", "implementation": "scattermoe", "ms": 4.0, "peak_mb": 30, "disturbed": False},
    ]
    lines = report.rows_table(rows, 600.0)
    # A row that was not disturbed counts more than one that was.
    assert lines[2:5] == [
        "| a | scattermoe | 2 | 1.00 | 10 | 50% |  |",
        "| a | other | 5 | 2.50 | 20 | 20% |  |",
        "| norm | scattermoe | 4 | 1.00 | 30 |  |  |",
    ]
    assert "- a, third: OutOfMemoryError" in lines
    launches = [
        {"ms": 1.0, "launch": {"A": 1}, "ships": False},
        {"ms": 2.0, "launch": {"A": 2}, "ships": True},
        {"ms": None, "launch": {"A": 3}, "ships": False, "error": "x"},
    ]
    sweep = {
        "dense_tflops": 800, "copy_gb_per_s": 2000,
        "problems": {
            "wide": {"gflop": 400, "mb": 100, "launches": launches},
            "narrow": {"gflop": 40, "mb": 1000, "launches": launches},
            "none": {"gflop": 40, "mb": 1000, "launches": launches[2:]},
        },
    }  # fmt: skip
    assert report.sweep_table(sweep)[2:5] == [
        "| wide | 2 | 1 | A 1 | 50% | dense |",
        "| narrow | 2 | 1 | A 1 | 50% | copy |",
        "| none |  |  |  |  |  |",
    ]


def test_tests_that_the_stages_choose_are_there(gpu, tmp_path) -> None:
    stages = gpu("stages")
    run = stages.Run(tmp_path, {}, dict, 2)
    tests = stages.test_job(run).command
    (memcheck, _) = stages.sanitizer_jobs("compute-sanitizer")
    lines = []
    for command in (tests, memcheck.command):
        chosen = [*command[command.index("pytest") + 1 :], "-p", "no:xdist", "--collect-only"]
        for option in ("-n", "--dist"):
            if option in chosen:
                del chosen[chosen.index(option) : chosen.index(option) + 2]
        lines.append(chosen)
    # One after the other in one process, which imports what they have in common once.
    code = "import json, sys, pytest; sys.exit(any([pytest.main(line) for line in json.loads(sys.argv[1])]))"
    process = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout
    for_tests, for_memcheck = map(int, re.findall(r"(\d+)/\d+ tests collected", process.stdout))
    assert for_tests >= 140
    assert for_memcheck >= 60


def test_rows_are_of_implementations_layers_and_cases_that_there_are(gpu, monkeypatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    rows = gpu("rows")
    compare = importlib.import_module("compare")
    assert set(rows.LAYERS) <= set(compare.SHAPES)
    assert set(rows.IMPLEMENTATIONS) <= set(compare.IMPLEMENTATIONS)
    for kind, cases in rows.CASES.items():
        assert set(cases) <= set(importlib.import_module(f"compare_{kind}").CASES["cuda"])
    everything = rows.planned({"axolotl": Path("a"), "unsloth": Path("b")})
    assert len({row.name for row in everything}) == len(everything) == 28
    assert [row.name for row in everything[6:8]] == ["loss-frozen-bf16", "quantized-gemma4-nf4"]
    assert [row.implementation for row in rows.planned({})].count("unsloth") == 0


def test_only_what_is_ours_fails_by_refusing(gpu) -> None:
    is_failure = gpu("rows").is_failure
    refused = ("scattermoe", "all", "scattermoe + PEFT", "liger", "PEFT's own")
    failures = [name for name in refused if is_failure({"implementation": name, "refused": "x"})]
    assert failures == ["scattermoe", "all", "scattermoe + PEFT"]
    assert not is_failure({"implementation": "scattermoe", "ms": 1.0})


def test_without_a_gpu_one_line_says_so() -> None:
    process = subprocess.run(
        COMMAND, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert process.stderr == f"error: no GPU for {sys.executable}: torch finds none\n"


def test_packages_that_are_missing_are_named(gpu) -> None:
    with pytest.raises(SystemExit, match="lacks no_such_package: pip install no_such_package"):
        gpu("run").measured_card(["torch", "no_such_package"])


def test_times_that_are_made_up_are_not_installed(tmp_path) -> None:
    command = [*COMMAND, "--dry", "--install", "--output", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "times that are made up are not installed" in process.stderr


def test_installing_puts_the_tables_where_they_ship(gpu, tmp_path, monkeypatch) -> None:
    stages = gpu("stages")
    monkeypatch.setattr(stages, "OPS", tmp_path / "ops")
    for folder in ("run/attention/tiles", "ops/attention/tiles"):
        tmp_path.joinpath(folder).mkdir(parents=True)
        tmp_path.joinpath(folder, "sm_90.json").write_text(folder)
    assert stages.install(tmp_path / "run") == [tmp_path / "ops" / "attention" / "tiles" / "sm_90.json"]
    assert tmp_path.joinpath("ops/attention/tiles/sm_90.json").read_text() == "run/attention/tiles"
