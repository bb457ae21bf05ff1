"""`make gpu` runs every step that it has time for, and says what became of each; here with small commands."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
# Long past any of these tests' limits.
SLEEP = "import time; time.sleep(600)"
DEAF = (
    "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); "
    f"{SLEEP}"
)


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        return importlib.import_module("gpu")


@pytest.fixture
def step(gpu):
    """``step(name, code)``: a step that runs Python code."""
    return lambda name, code, minutes=1.0, **options: gpu.Step(
        name, [sys.executable, "-c", code], minutes, **options
    )


def words(gpu, todo, folder, minutes=5.0):
    return {outcome.name: (outcome.word, outcome.detail) for outcome in gpu.run_all(todo, folder, minutes)}


def test_a_step_that_fails_is_reported_and_the_others_run(gpu, step, tmp_path, capsys) -> None:
    todo = [
        step("first", "print('fine')"),
        step("second", "import sys; print('said'); sys.exit('why it failed')"),
        step("third", "print('fine')"),
    ]
    assert gpu.report(gpu.run_all(todo, tmp_path, 5.0), tmp_path) == 1
    printed = capsys.readouterr().out
    assert "    said\n    why it failed\n" in printed
    summary = [line.split() for line in printed.partition("\nstep ")[2].splitlines()[1:4]]
    assert [line[:2] for line in summary] == [["first", "passed"], ["second", "failed"], ["third", "passed"]]
    assert tmp_path.joinpath("first.log").read_text().splitlines()[1:] == ["fine"]


def test_where_all_pass_so_does_the_run(gpu, step, tmp_path) -> None:
    assert gpu.report(gpu.run_all([step("only", "pass")], tmp_path, 5.0), tmp_path) == 0


def test_a_step_that_takes_too_long_is_ended_with_what_it_started(gpu, step, tmp_path) -> None:
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid); {SLEEP}"
    outcomes = words(gpu, [step("long", code, 0.05), step("next", "pass")], tmp_path)
    word, detail = outcomes["long"]
    assert word == "failed"
    assert detail.startswith("not done after ")
    assert outcomes["next"][0] == "passed"
    started = int(tmp_path.joinpath("long.log").read_text().splitlines()[1])
    assert not runs(started)


def test_a_step_that_does_not_end_when_asked_is_killed(gpu, step, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.2)
    assert words(gpu, [step("deaf", DEAF, 0.05)], tmp_path)["deaf"][0] == "failed"
    assert not runs(int(tmp_path.joinpath("deaf.log").read_text().splitlines()[1]))


def test_what_a_step_leaves_in_a_temporary_folder_goes_with_it(gpu, step, tmp_path) -> None:
    code = f"import tempfile; print(tempfile.mkdtemp(), flush=True); {SLEEP}"
    assert words(gpu, [step("long", code, 0.05)], tmp_path)["long"][0] == "failed"
    assert not Path(tmp_path.joinpath("long.log").read_text().splitlines()[1]).exists()


def test_what_no_time_is_left_for_is_skipped_and_said(gpu, step, tmp_path) -> None:
    outcomes = words(
        gpu, [step("first", "import time; time.sleep(2)", 0.1), step("second", "pass", 0.1)], tmp_path, 0.11
    )
    assert outcomes["first"][0] == "passed"
    assert outcomes["second"] == ("skipped", "the 0.11 minutes are spent")
    assert not tmp_path.joinpath("second.log").exists()


def test_a_step_waits_for_the_one_that_it_needs_and_is_told_its_time(gpu, step, tmp_path) -> None:
    todo = [
        step("bad", "raise SystemExit(3)"),
        step("needs bad", "pass", after="bad"),
        step("good", "import sys; print(sys.argv[1])"),
        step("needs good", "pass", after="good"),
        step("no tool", "pass", missing="no such tool"),
    ]
    todo[2] = gpu.Step("good", [*todo[2].command, "{minutes}"], 3.0)
    outcomes = words(gpu, todo, tmp_path)
    assert outcomes["bad"][1].startswith("exit status 3 after ")
    assert outcomes["needs bad"] == ("skipped", "bad did not pass")
    assert outcomes["needs good"][0] == "passed"
    assert outcomes["no tool"] == ("skipped", "no such tool")
    assert tmp_path.joinpath("good.log").read_text().splitlines()[1:] == ["2.0"]


def test_steps_find_what_is_in_the_repository_and_what_the_caller_named(
    gpu, step, tmp_path, monkeypatch
) -> None:
    tmp_path.joinpath("named_by_the_caller.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import kernelpress.spec.load, scattermoe_lora, named_by_the_caller, os; print(os.environ['MINE'])"
    outcomes = words(gpu, [step("imports", code, environment={"MINE": "here"})], tmp_path)
    assert outcomes["imports"][0] == "passed", tmp_path.joinpath("imports.log").read_text()


@pytest.mark.parametrize(
    "received",
    [[signal.SIGINT], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP]],
    ids=["interrupt", "two interrupts", "end", "hang-up"],
)
def test_what_ends_the_run_ends_its_step(tmp_path, received) -> None:
    # As a terminal would: a shell's background job ignores the signal.
    code = (
        "import gpu, signal, sys; from pathlib import Path; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); gpu.end_steps_when_ended(); "
        f"step = gpu.Step('long', [sys.executable, '-c', {DEAF!r}], 5); gpu.GRACE_SECONDS = 2; "
        f"list(gpu.run_all([step], Path({str(tmp_path)!r}), 5))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "benchmarks")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "long.log"
    until = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) == 2):
        assert time.monotonic() < until
        time.sleep(0.05)
    for number in received:
        process.send_signal(number)
        time.sleep(0.5)
    assert process.wait(60) != 0
    assert not runs(int(log.read_text().splitlines()[1]))


def runs(process: int) -> bool:
    """Tell whether a process runs. One that ended and that nobody waited for is none."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def test_every_step_runs_a_script_that_is_there_with_options_that_it_takes(
    gpu, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    todo = gpu.steps(tmp_path, tmp_path)
    names = ["tests", "compare", "attention", "norm_rotary", "memcheck", "racecheck"]
    assert [planned.name for planned in todo] == names
    assert [planned.name for planned in todo if planned.missing] == ["memcheck", "racecheck"]
    for planned in todo:
        if planned.command[1].endswith(".py"):
            usage = subprocess.run(
                [*planned.command[:2], "--help"],
                env={**os.environ, "PYTHONPATH": str(REPOSITORY / "torch-ext")},
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            assert all(option in usage for option in planned.command if option.startswith("--"))


def test_tests_that_the_steps_choose_are_there(gpu, tmp_path) -> None:
    for planned in gpu.steps(tmp_path, None):
        if "pytest" in planned.command:
            chosen = planned.command[planned.command.index("pytest") - 1 :]
            process = subprocess.run(
                [sys.executable, *chosen, "--collect-only"],
                cwd=REPOSITORY, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert process.returncode == 0, process.stdout
            collected = re.search(r"(\d+)/\d+ tests collected", process.stdout)
            assert collected
            assert int(collected[1]) >= (5 if planned.name == "tests" else 60)


def test_without_a_gpu_one_line_says_so() -> None:
    process = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr == f"error: no GPU for {sys.executable}: torch finds none\n"


def test_packages_that_are_missing_are_named(gpu) -> None:
    with pytest.raises(SystemExit, match="lacks no_such_package: pip install no_such_package"):
        gpu.gpu_name(["torch", "no_such_package"])
