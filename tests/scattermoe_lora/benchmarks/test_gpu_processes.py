"""Jobs of a run on a GPU share the time and the card, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
# Long past any of these tests' limits.
SLEEP = "import time; time.sleep(600)"
DEAF = (
    "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); "
    f"{SLEEP}"
)


@pytest.fixture
def processes(gpu, monkeypatch):
    module = gpu("processes")
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    return module


@pytest.fixture
def run(processes, tmp_path):
    """``run({"name": code}, seconds, at_once)``: outcomes of Python programs."""

    def run_all(programs: dict[str, str], seconds: float = 120.0, at_once: int = 2) -> dict[str, str]:
        jobs = [processes.Job(name, [sys.executable, "-c", code]) for name, code in programs.items()]
        return processes.run_all(jobs, tmp_path, time.monotonic() + seconds, at_once)

    return run_all


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines()[1:] if log.exists() else []


def runs(process: int) -> bool:
    """Tell whether a process runs. One that ended and that nobody waited for is none."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_job_that_fails_leaves_the_others(run, tmp_path) -> None:
    outcomes = run({"first": "print('fine')", "second": "import sys; sys.exit(3)", "third": "print('fine')"})
    assert outcomes == {"first": "passed", "second": "exit status 3", "third": "passed"}
    assert lines(tmp_path / "first.log") == lines(tmp_path / "third.log") == ["fine"]


def test_what_the_time_does_not_suffice_for_is_cut_off_with_what_it_started_or_not_begun(
    run, tmp_path
) -> None:
    child = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid, flush=True)"
    )
    begin = time.monotonic()
    outcomes = run({"long": f"{child}; {SLEEP}", "deaf": DEAF, "next": "pass"}, seconds=20.0)
    assert outcomes == {"long": "cut off", "deaf": "cut off", "next": "no time"}
    assert time.monotonic() - begin < 120
    for name in ("long", "deaf"):
        (process,) = lines(tmp_path / f"{name}.log")
        assert not runs(int(process))
    assert not tmp_path.joinpath("next.log").exists()


def test_no_more_jobs_run_at_once_than_may(run, tmp_path) -> None:
    code = (
        f"import os, time; from pathlib import Path; folder = Path({str(tmp_path)!r}); "
        "own = folder / f'{os.getpid()}.runs'; own.touch(); "
        "print(len(list(folder.glob('*.runs')))); time.sleep(0.3); own.unlink()"
    )
    assert set(run({str(i): code for i in range(5)}, at_once=2).values()) == {"passed"}
    together = [int(lines(tmp_path / f"{i}.log")[0]) for i in range(5)]
    assert max(together) <= 2


def test_what_a_job_leaves_in_a_temporary_folder_goes_with_it(run, tmp_path) -> None:
    run({"leaves": "import tempfile; print(tempfile.mkdtemp())"})
    (folder,) = lines(tmp_path / "leaves.log")
    assert not Path(folder).exists()


def test_jobs_find_what_is_in_the_repository_and_what_the_caller_named(run, tmp_path, monkeypatch) -> None:
    tmp_path.joinpath("named_by_the_caller.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import kernelpress.spec.load, scattermoe_lora, gpu.budget, named_by_the_caller"
    assert run({"imports": code}) == {"imports": "passed"}


@pytest.mark.parametrize(
    "received",
    [[signal.SIGINT], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP]],
    ids=["interrupt", "two interrupts", "end", "hang-up"],
)
def test_what_ends_the_run_ends_its_jobs(tmp_path, received) -> None:
    # As a terminal would: a shell's background job ignores the signal.
    code = (
        "import signal, sys, time; from pathlib import Path; from gpu import processes as p; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); p.end_children_when_ended(); "
        f"p.GRACE_SECONDS = 2; job = p.Job('long', [sys.executable, '-c', {DEAF!r}]); "
        f"p.run_all([job], Path({str(tmp_path)!r}), time.monotonic() + 600, 1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "benchmarks")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: len(lines(tmp_path / "long.log")) == 1)
    for number in received:
        process.send_signal(number)
        time.sleep(0.5)
    assert process.wait(60) != 0
    assert not runs(int(lines(tmp_path / "long.log")[0]))


def test_stages_share_the_time_and_what_one_leaves_over_serves_the_others(gpu, monkeypatch) -> None:
    budget = gpu("budget")
    now = [1000.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    whole = budget.Budget(10, {"first": 0.5, "second": 0.25, "third": 0.25})
    assert whole.until("first") == 1300.0
    now[0] = 1100.0
    assert whole.until("second") == 1350.0
    assert whole.until("third") == 1600.0 == whole.end
    # Nothing begins after the end, whatever went before.
    now[0] = 1700.0
    assert whole.until("third") == 1700.0


TURN = """
import sys, time
from pathlib import Path
from gpu.card import Turns
turns = Turns(Path(sys.argv[1]), sys.argv[2])
time.sleep(0.3 * int(sys.argv[2]))
for _ in range(3):
    with turns.alone():
        time.sleep(0.05)
"""


def test_who_is_timed_is_alone(processes, gpu, tmp_path) -> None:
    jobs = [processes.Job(str(i), [sys.executable, "-c", TURN, str(tmp_path), str(i)]) for i in range(4)]
    outcomes = processes.run_all(jobs, tmp_path, time.monotonic() + 120, 4)
    assert set(outcomes.values()) == {"passed"}
    turns = gpu("card").read_lines(tmp_path / "turns.jsonl")
    alone = [turn for turn in turns if turn["alone"]]
    assert len(alone) == 12
    assert_alone(turns)


def assert_alone(turns) -> None:
    """No turn of any kind overlaps one that is alone."""
    for turn in turns:
        for other in turns:
            if turn is not other and turn["alone"]:
                assert other["end"] <= turn["begin"] or turn["end"] <= other["begin"], (turn, other)


KILLED = """
import sys, time
from pathlib import Path
from gpu.card import Turns
with Turns(Path(sys.argv[1]), "killed").alone():
    print(flush=True)
    time.sleep(600)
"""


def test_a_process_that_is_killed_gives_its_turn_back(gpu, tmp_path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "benchmarks")}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate()
    with gpu("card").Turns(tmp_path, "next").alone():
        pass


@pytest.mark.parametrize(
    ("rates", "times", "disturbed"),
    [([720], 1, False), ([500, 800], 2, False), ([500, 600, 1000], 3, True), ([float("nan"), 785], 2, False)],
)
def test_a_row_whose_dense_rate_is_off_is_timed_again_and_says_so(gpu, rates, times, disturbed) -> None:
    timed, left = [], list(rates)
    result, rate, told = gpu("card").time_undisturbed(
        lambda: timed.append(0) or len(timed), lambda: left.pop(0), 785
    )
    assert (result, len(timed), told) == (times, times, disturbed)
    assert rate == rates[times - 1]


def test_a_line_that_a_kill_cut_off_is_left_out(gpu, tmp_path) -> None:
    card = gpu("card")
    card.append_line(tmp_path / "lines", {"a": 1})
    with tmp_path.joinpath("lines").open("a") as file:
        file.write('{"b": ')
    assert card.read_lines(tmp_path / "lines") == [{"a": 1}]
    assert card.read_lines(tmp_path / "missing") == []
