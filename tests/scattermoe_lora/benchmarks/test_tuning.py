"""Tuning finds the fastest launch of a rule in bounded time, and writes tables as they are read."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[3]
FOLDERS = [REPOSITORY / "benchmarks", REPOSITORY / "torch-ext"]


@pytest.fixture(scope="module")
def tune():
    with pytest.MonkeyPatch.context() as patch:
        for folder in FOLDERS:
            patch.syspath_prepend(folder)
        return importlib.import_module("tune")


def test_tuning_considers_every_launch_that_ships_and_writes_tables_as_they_are_read(tune) -> None:
    for device in tune.tiles.DEVICES:
        found = []
        for kernel, rules in tune.tiles.load(tune.TILES, device).rules.items():
            for rule in rules:
                candidates = list(tune.candidates(kernel, rule))
                assert all(set(each) == set(rule.launch) for each in candidates)
                if rule.launch["num_stages"] <= 4:
                    assert dict(rule.launch) in candidates
                found.append(tune.Tuned(kernel, rule, 1.0, dict(rule.launch), 1.0))
        file = tune.TILES / f"{device}.json"
        assert tune.render(tune.tiles.load(tune.TILES, device).measured, found) == file.read_text()


def test_tuning_without_a_gpu_says_so() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "torch-ext"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "tune.py")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr == "error: tuning times kernels on a GPU, and this machine has none\n"


@pytest.fixture
def rules(tune):
    return [
        (kernel, rule)
        for kernel, rules in tune.tiles.load(tune.TILES, "sm_90").rules.items()
        for rule in rules
    ]


class Clock:
    """Gives launches made-up times, and counts."""

    def __init__(self, milliseconds) -> None:
        self.milliseconds, self.short, self.long = milliseconds, 0, 0

    def __call__(self, launch, longer):
        self.short, self.long = self.short + (not longer), self.long + longer
        return self.milliseconds(launch)


def smooth(launch):
    """As on a GPU: larger tiles take fewer reads, up to a point, and warps and stages change less than tiles do."""
    blocks = [value for name, value in launch.items() if name.startswith("BLOCK")]
    far = sum(
        abs(block.bit_length() - best.bit_length())
        for block, best in zip(blocks, (128, 128, 64), strict=True)
    )
    return 1 + far + 0.2 * (launch["num_warps"] != 8) + 0.1 * (launch["num_stages"] != 4)


def test_search_finds_the_fastest_launch_and_times_a_third_of_them(tune, rules) -> None:
    total = looked = 0
    for kernel, rule in rules:
        launches, clock = list(tune.candidates(kernel, rule)), Clock(smooth)
        found = tune.search(launches, clock)
        assert found[0] == (min(map(smooth, launches)), min(launches, key=smooth))
        assert clock.long == len(found) <= tune.BEST_LAUNCHES
        total, looked = total + len(launches), looked + clock.short
    assert looked < total / 3
    # What is said before it begins.
    assert looked == pytest.approx(tune.estimate(rules)[0], rel=0.1)


def test_a_tile_that_fits_with_two_stages_alone_is_found_and_one_that_does_not_run_is_left_out(
    tune, rules
) -> None:
    kernel, rule = next(pair for pair in rules if set(pair[1].limits.values()) == {None})
    launches = list(tune.candidates(kernel, rule))
    best = {name: max(each[name] for each in launches) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}

    def large_is_fast(launch):
        blocks = [launch[name] for name in best]
        if launch["num_stages"] > 2 and blocks[0] * blocks[1] > 128 * 128:
            return None
        return 1e6 / (blocks[0] * blocks[1] * blocks[2])

    (milliseconds, launch), *_ = tune.search(launches, Clock(large_is_fast))
    assert launch["num_stages"] == 2
    assert launch["BLOCK_M"] * launch["BLOCK_N"] > 128 * 128
    assert milliseconds == large_is_fast(launch)
    assert tune.search(launches, lambda launch, longer: None) == []


@pytest.mark.parametrize(
    "error",
    [
        "triton.OutOfResources(300000, 232448, 'shared memory')",
        "PTXASError('bad')",
        "RuntimeError('PassManager::run failed')",
    ],
)
def test_a_launch_that_cannot_run_has_no_time(tune, monkeypatch, error) -> None:
    def failing(*_, **__):
        raise eval(error, vars(tune))

    monkeypatch.setattr(tune, "do_bench", failing)
    assert tune.milliseconds(lambda: None, {}, True) is None


def test_an_error_of_the_gpu_ends_tuning(tune, monkeypatch) -> None:
    def failing(*_, **__):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(tune, "do_bench", failing)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.milliseconds(lambda: None, {}, True)


@pytest.mark.parametrize(
    ("wrong", "taken"), [([], "first"), (["first"], "second"), (["first", "second"], "own")]
)
def test_a_launch_that_computes_something_else_is_not_taken(
    tune, rules, monkeypatch, capsys, wrong, taken
) -> None:
    kernel, rule = rules[0]
    launches = list(tune.candidates(kernel, rule))
    named = {"own": dict(rule.launch), "first": launches[1], "second": launches[2]}
    running = []
    monkeypatch.setattr(tune, "milliseconds", lambda call, launch, longer: 3.0)
    monkeypatch.setattr(tune, "search", lambda *_: [(1.0, named["first"]), (2.0, named["second"])])

    def call():
        (name,) = (name for name, launch in named.items() if launch == tune.gpu.tile())
        running.append(name)
        result = torch.ones(400, 400)
        # One small block of one of the results.
        result[:16, :16] = 0.0 if name in wrong else 1.0
        return [torch.ones(4), result]

    given = tune.Problem(call, [torch.ones(4), torch.ones(400, 400)])
    monkeypatch.setattr(tune, "problem", lambda *_: given)
    found = tune.tune(kernel, rule)
    assert found.launch == named[taken]
    assert (found.before, found.after) == (3.0, {"first": 1.0, "second": 2.0, "own": 3.0}[taken])
    assert capsys.readouterr().out.count("computes something else than torch") == len(wrong)


@pytest.mark.parametrize("until", [float("inf"), float("-inf")], ids=["in time", "when the time is up"])
def test_a_launch_that_is_hardly_faster_is_not_taken(tune, rules, monkeypatch, until) -> None:
    kernel, rule = rules[0]
    other = next(each for each in tune.candidates(kernel, rule) if each != dict(rule.launch))
    monkeypatch.setattr(tune, "milliseconds", lambda call, launch, longer: 3.0)
    monkeypatch.setattr(tune, "search", lambda *_: [(2.99, other)])
    monkeypatch.setattr(tune, "problem", lambda *_: tune.Problem(lambda: [torch.ones(1)], [torch.ones(1)]))
    assert tune.tune(kernel, rule, until) == tune.Tuned(kernel, rule, 3.0, dict(rule.launch), 3.0)


def test_nothing_is_timed_when_the_time_is_up(tune, rules, monkeypatch) -> None:
    kernel, rule = rules[0]
    timed = []
    clock = iter(range(1000))
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(tune, "milliseconds", lambda call, launch, longer: timed.append(launch) or 1.0)
    monkeypatch.setattr(tune, "problem", lambda *_: tune.Problem(list, []))
    assert tune.tune(kernel, rule, until=5) == tune.Tuned(kernel, rule, None, dict(rule.launch), None)
    assert len(timed) == 5


def test_a_table_is_written_at_once(tune, rules, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tune.torch.cuda, "get_device_name", lambda: "made up")
    found = [tune.Tuned(kernel, rule, 2.0, dict(rule.launch), 1.0) for kernel, rule in rules]
    found[-1] = tune.Tuned(*rules[-1], None, dict(rules[-1][1].launch), None)
    path = tmp_path / "folder" / "sm_90.json"
    tune.write(path, found)
    assert json.loads(path.read_text())["measured"]["rules"] == f"{len(found) - 1} of {len(found)}"
    before = path.read_text()

    def cut_off(self, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        tune.write(path, found)
    assert path.read_text() == before


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "sm_90"), ((10, 3), "sm_103")])
def test_a_gpu_that_takes_anothers_table_does_not_replace_it(
    tune, monkeypatch, capsys, capability, name
) -> None:
    monkeypatch.setattr(tune.torch.version, "hip", None)
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(tune, "tune_all", lambda *_: [])
    written = []
    monkeypatch.setattr(tune, "write", lambda path, found: written.append(path.name))
    monkeypatch.setattr(sys, "argv", ["tune.py", "--install"])
    tune.tiles.table_of.cache_clear()
    if name == "sm_90":
        tune.main()
        assert written == ["sm_90.json"]
    else:
        with pytest.raises(SystemExit, match="sm_103 has no table of its own; sm_100"):
            tune.main()
        assert written == []
    tune.tiles.table_of.cache_clear()


def test_rules_that_no_time_is_left_for_keep_their_launches(tune, rules, monkeypatch, capsys) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: 10 * next(clock)))
    kept = []

    def one(kernel, rule, until):
        assert until == 60
        return tune.Tuned(kernel, rule, 2.0, {**rule.launch, "num_stages": 2}, 1.0)

    result = tune.tune_all(rules, 1.0, lambda found: kept.append(list(found)), one)
    found, timed = kept[-1], len(kept)
    assert found == result
    assert 0 < timed < len(rules)
    assert [(each.kernel, each.rule) for each in found] == rules
    done = [each for each in found if each.after is not None]
    assert len(done) == timed
    assert {each.rule.bytes for each in done} == {2}
    assert all(each.launch == dict(each.rule.launch) for each in found if each.after is None)
    assert (
        f"{len(rules) - timed} of {len(rules)} rules keep their launches: the time is up"
        in capsys.readouterr().out
    )


# Triton decides at its import whether it interprets: a process of its own.
PROBLEMS = """
import tune, tune_problems as sizes
sizes.EXPERTS, sizes.ROWS, sizes.WIDE, sizes.INTERMEDIATE, sizes.RANK = 3, 20, 64, 48, 16
for kernel, rules in tune.tiles.load(tune.TILES, "sm_90").rules.items():
    for rule in rules:
        if rule.bytes == 4:
            given = tune.problem(kernel, rule, "cpu")
            print(tune.is_right(given, dict(rule.launch)), end=" ")
            for i in range(len(given.expected)):
                wrong = tune.Problem(given.call, [(1.05 if j == i else 1) * t for j, t in enumerate(given.expected)])
                assert not tune.is_right(wrong, dict(rule.launch))
"""


def test_what_is_timed_computes_what_torch_computes() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, FOLDERS))}
    process = subprocess.run(
        [sys.executable, "-c", PROBLEMS], env=environment, capture_output=True, text=True, check=False
    )
    assert process.stdout.split() == 7 * ["True"], process.stderr
