"""The sweep times launches that compute what torch computes, and writes tables that load and serve what was timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[3]
OPS = REPOSITORY / "torch-ext" / "scattermoe_lora" / "ops"
TIMING = {
    "device": "a card",
    "date": "today",
    "torch": "2",
    "triton": "3",
    "commit": None,
    "figures": "sweep.json",
}


@pytest.fixture(scope="module")
def plan(gpu):
    return gpu("sweep_plan")


@pytest.fixture(scope="module")
def sweep(gpu):
    return gpu("sweep")


def test_the_plan_names_parts_and_sizes_that_there_are_and_options_of_the_kernels(plan, gpu) -> None:
    entries = plan.load_plan()
    assert {entry.part for entry in entries} == set(gpu("parts").PARTS)
    assert len({entry.name for entry in entries}) == len(entries)
    heads = {entry.sizes["head_dim"] for entry in entries if entry.part.startswith("attention")}
    assert heads == {64, 128, 256, 512}
    assert any(entry.sizes.get("window") for entry in entries)
    assert (
        len(
            {
                e.sizes["tokens"] * e.sizes["top_k"] / e.sizes["experts"]
                for e in entries
                if e.part == "gate_up"
            }
        )
        > 2
    )


def test_candidates_are_tried_with_options_too(plan, tmp_path) -> None:
    content = {
        "sizes": {"one": {"tokens": 8}},
        "candidates": {
            "c": {"names": ["A", "B"], "launches": [[1, 2], [3, 4], [5, 6], [7, 8]], "options": [{"NEW": 1}]},
            "d": {"names": ["A", "C"], "launches": [[9, 1]], "options": []},
        },
        "sweep": [["gate_up", "one", "c"], ["norm_forward", "one", None], ["down", "one", "c", "d"]],
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    first, second, third = plan.load_plan(path)
    assert [dict(launch) for launch in first.candidates] == [
        {"A": 1, "B": 2}, {"A": 3, "B": 4}, {"A": 5, "B": 6}, {"A": 7, "B": 8},
        {"A": 1, "B": 2, "NEW": 1}, {"A": 3, "B": 4, "NEW": 1}, {"A": 5, "B": 6, "NEW": 1},
    ]  # fmt: skip
    assert second.candidates == ()
    assert third.candidates == (*first.candidates, {"A": 9, "C": 1})


@pytest.mark.parametrize("workers", [1, 3, 15])
def test_every_launch_is_one_workers_and_the_one_that_ships_comes_first(plan, workers) -> None:
    entries = plan.load_plan()
    shares = plan.shares(entries, workers)
    assert len(shares) == workers
    turns = [turn for share in shares for turn in share]
    for entry in entries:
        own = {"OWN": 1}
        numbers = sorted(number for other, number in turns if other is entry)
        launches = [launch for number in numbers for launch in plan.launches_of(entry, number, own)]
        assert launches == [own, *entry.candidates]
    # One that ships and is a candidate, too, is timed once.
    first = entries[0]
    assert plan.launches_of(first, 0, first.candidates[1])[:2] == [first.candidates[1], first.candidates[0]]
    # What is worth most is compiled first.
    assert [share[0] for share in shares] == [*_first_turns(entries, plan)][:workers]


def _first_turns(entries, plan):
    for entry in entries:
        for number in range(-(-(1 + len(entry.candidates)) // plan.IN_A_TURN)):
            yield entry, number


class Turns:
    """Nobody else is there."""

    alone_now = False

    @contextmanager
    def alone(self):
        self.alone_now = True
        yield
        self.alone_now = False


@pytest.fixture
def worker(sweep, gpu, monkeypatch, tmp_path):
    """``worker(results_of)``: a worker on a problem whose results depend on the launch, and its lines."""
    problems, plan = gpu("problems"), gpu("sweep_plan")
    sizes = {"rows": 512.0, "n": 1408, "k": 2816}
    entry = plan.Entry("gate_up gemma4", "gate_up", {}, ({"BLOCK": 1}, {"BLOCK": 2}))

    def make(results_of, milliseconds, compiles=lambda launch: None):
        turns = Turns()
        running: list = []

        @contextmanager
        def launched_with(problem, launch):
            running.append(launch)
            yield
            running.pop()

        def call():
            if not turns.alone_now:
                compiles(running[-1])
            return [results_of(running[-1])]

        def clock(called, launch):
            assert turns.alone_now
            return milliseconds(launch)

        problem = problems.Problem(
            "grouped_linear", "grouped_matmul", sizes, 1e9, 1e6, call, lambda: [torch.ones(400, 400)]
        )
        monkeypatch.setattr(sweep, "make", lambda entry, real: problem)
        monkeypatch.setattr(sweep, "launched_with", launched_with)
        monkeypatch.setattr(sweep, "own_launch", lambda problem, device: {"BLOCK": 0})
        launcher = sweep.Launcher()
        worker = sweep.Worker(turns, tmp_path / "sweep-0.jsonl", launcher, clock, "sm_90", True)
        return worker, entry

    return make


def right(launch):
    return torch.ones(400, 400)


def lines(gpu, tmp_path):
    found = gpu("card").read_lines(tmp_path / "sweep-0.jsonl")
    return [
        (line["result"]["launch"]["BLOCK"], line["result"]["ms"], line["result"].get("error"))
        for line in found
    ]


INF = float("inf")


def test_a_launch_that_computes_something_else_or_nan_is_left_out(worker, gpu, tmp_path, plan) -> None:
    def results_of(launch):
        result = torch.ones(400, 400)
        # One small block.
        result[:16, :16] = {0: 1.0, 1: 0.0, 2: float("nan")}[launch["BLOCK"]]
        return result

    one, entry = worker(results_of, lambda launch: 3.0 - launch["BLOCK"])
    one.run([(entry, 0)], INF, INF)
    wrong = "computes something else than torch"
    assert lines(gpu, tmp_path) == [(0, 3.0, None), (1, None, wrong), (2, None, wrong)]
    (problem,) = plan.collect(tmp_path, plan.PLAN).values()
    assert gpu("tables").fastest(problem) == {"BLOCK": 0}


@pytest.mark.parametrize(
    "error",
    [
        "triton.OutOfResources(300000, 232448, 'shared memory')",
        "PTXASError('bad')",
        "RuntimeError('PassManager::run failed')",
    ],
)
def test_a_launch_that_does_not_compile_has_no_time_and_says_why(worker, sweep, gpu, tmp_path, error) -> None:
    def compiles(launch):
        if launch["BLOCK"] == 1:
            raise eval(error, vars(sweep))

    one, entry = worker(right, lambda launch: 1.0, compiles)
    one.run([(entry, 0)], INF, INF)
    (first, *rest) = lines(gpu, tmp_path)
    assert first[:2] == (1, None)
    assert first[2].startswith(error.partition("(")[0].removeprefix("triton."))
    assert [line[:2] for line in rest] == [(0, 1.0), (2, 1.0)]


def test_an_error_of_the_gpu_ends_the_worker_and_leaves_what_it_had(worker, gpu, tmp_path) -> None:
    def milliseconds(launch):
        if launch["BLOCK"] == 1:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        return 1.0

    one, entry = worker(right, milliseconds)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        one.run([(entry, 0)], INF, INF)
    assert lines(gpu, tmp_path) == [(0, 1.0, None)]


def test_nothing_is_compiled_or_timed_when_its_time_is_up(worker, sweep, gpu, monkeypatch, tmp_path) -> None:
    one, entry = worker(right, lambda launch: 1.0)
    one.run([(entry, 0)], -INF, INF)
    assert lines(gpu, tmp_path) == []
    one.run([(entry, 0)], INF, -INF)
    assert lines(gpu, tmp_path) == []


def test_torchs_product_is_left_out_while_launches_compile(sweep, monkeypatch) -> None:
    library, multiplied = sweep.library, []
    monkeypatch.setattr(library, "grouped_mm", lambda x, *_, **__: multiplied.append(1) or x)
    x, weight = torch.zeros(4, 16), torch.zeros(2, 8, 16)
    routing = sweep.Routing(torch.arange(4), torch.tensor([0, 1, 4]))
    with sweep.Launcher().compiling():
        assert library.product(x, weight, routing, None).shape == (4, 8)
    assert not multiplied
    library.product(x, weight, routing, None)
    assert multiplied


def result(ms, ships=False, **launch):
    return {"ms": ms, "launch": launch, "ships": ships}


@pytest.mark.parametrize(
    ("launches", "taken"),
    [
        ([result(1.0, A=1), result(1.5, True, A=2)], {"A": 1}),
        # Hardly faster.
        ([result(1.0, A=1), result(1.01, True, A=2)], {"A": 2}),
        ([result(None, True, A=1), result(2.0, A=3)], {"A": 3}),
        ([result(None, True, A=1)], None),
        # Nobody knows whether it is faster than the one that ships.
        ([result(2.0, A=3)], None),
    ],
)
def test_the_fastest_launch_is_taken_unless_the_one_that_ships_is_as_fast(gpu, launches, taken) -> None:
    assert gpu("tables").fastest({"launches": launches}) == taken


def test_tables_are_written_as_they_ship(gpu) -> None:
    tables = gpu("tables")
    files = sorted(OPS.glob("*/tiles/*.json"))
    assert files
    for file in files:
        assert tables.render(json.loads(file.read_text())) == file.read_text(), file


def test_a_table_of_a_sweep_loads_and_serves_what_was_timed_with_the_fastest_and_the_rest_as_before(
    gpu, plan, tmp_path
) -> None:
    tables = gpu("tables")
    tiles = sys.modules["scattermoe_lora.ops.tile_tables"]
    matmul = {
        "BLOCK_M": 64,
        "BLOCK_N": 64,
        "BLOCK_K": 64,
        "GROUP_M": 8,
        "SCHEDULE": 1,
        "num_warps": 4,
        "num_stages": 3,
    }
    attention = {"BLOCK_M": 64, "BLOCK_N": 16, "CHUNK": 64, "num_warps": 4, "num_stages": 3}
    gate_up, few = {"rows": 512.0, "n": 1408, "k": 2816}, {"rows": 4.0, "n": 1536, "k": 2048}
    sizes = [
        {"head_dim": d, "same_kv": False, "window": w} for d, w in ((512, False), (256, True), (256, False))
    ]
    problems = {
        name: {
            "operator": operator,
            "kernel": kernel,
            "sizes": size,
            "launches": [result(1.0, True, **launch)],
        }
        for name, operator, kernel, size, launch in (
            ("gate_up", "grouped_linear", "grouped_matmul", gate_up, matmul),
            ("few", "grouped_linear", "grouped_matmul", few, matmul),
            *((str(s), "attention", "attention_forward", s, attention) for s in sizes),
        )
    }
    # What stands in for torch's operators has a rule where it is faster, and none where torch is.
    sort = {"pairs": 65536, "experts": 128}
    problems["sort"] = {
        **problems["few"], "kernel": "sort_pairs", "sizes": sort, "itemsize": 8,
        "launches": [result(1.0, BLOCK=256), result(2.0, ships=True)],
    }  # fmt: skip
    problems["by torch"] = {
        **problems["sort"], "kernel": "sum_choices", "itemsize": 2, "sizes": {"n": 512, "k": 8},
        "launches": [result(1.0, ships=True), result(2.0, BLOCK=256)],
    }  # fmt: skip
    problems["untimed"] = {**problems["few"], "kernel": "grouped_outer", "launches": [result(None, A=1)]}
    problems["no table"] = {**problems["few"], "operator": "nothing", "kernel": "nothing"}
    for before in (OPS, tmp_path / "first"):
        # A second sweep replaces the rules of the first.
        after = tmp_path / ("first" if before == OPS else "second")
        written = tables.write(problems, before, "sm_90", after, "card/today", TIMING)
        assert [path.parts[-3] for path in written] == ["attention", "grouped_linear"]
    texts = [
        [path.read_text() for path in sorted(tmp_path.glob(f"{n}/*/tiles/*"))] for n in ("first", "second")
    ]
    assert texts[0] == texts[1]
    for problem in problems.values():
        folder = tmp_path / "second" / problem["operator"] / "tiles"
        if problem["operator"] == "nothing" or problem["kernel"] == "grouped_outer":
            continue
        kernel, size, itemsize = problem["kernel"], problem["sizes"], problem.get("itemsize", 2)
        launch = tiles.lookup(folder, "sm_90", kernel, itemsize, size) or {}
        assert dict(launch) == problem["launches"][0]["launch"]
        if not launch:
            continue
        table = tiles.load(folder, "sm_90")
        rule = next(rule for rule in table.rules[kernel] if rule.serves(itemsize, size))
        assert table.timing(rule) == tiles.Timing(**TIMING)
    assert all(
        tiles.lookup(tmp_path / "second/grouped_linear/tiles", "sm_90", "sort_pairs", 8, size) is None
        for size in ({**sort, "pairs": 131073}, {**sort, "pairs": 32767}, {**sort, "experts": 63})
    )
    # Sizes unlike those, other bytes, another kernel: as before.
    for operator, kernel, itemsize, size in (
        ("grouped_linear", "grouped_matmul", torch.bfloat16, {"rows": 2048, "n": 1408, "k": 2816}),
        ("grouped_linear", "grouped_matmul", torch.float32, gate_up),
        ("grouped_linear", "grouped_outer", torch.bfloat16, gate_up),
        (
            "attention",
            "attention_forward",
            torch.bfloat16,
            {"head_dim": 512, "same_kv": True, "window": False},
        ),
        (
            "attention",
            "attention_forward",
            torch.bfloat16,
            {"head_dim": 512, "same_kv": False, "window": True},
        ),
        (
            "attention",
            "attention_forward",
            torch.bfloat16,
            {"head_dim": 128, "same_kv": False, "window": False},
        ),
    ):
        new = tiles.find(tmp_path / "second" / operator / "tiles", "sm_90", kernel, itemsize, size)
        assert new == tiles.find(OPS / operator / "tiles", "sm_90", kernel, itemsize, size)


# Triton decides at its import whether it interprets: a process of its own.
INTERPRETED = """
import json, sys
import torch
from gpu import parts, problems, sweep
from gpu.sweep_plan import PLAN, Entry, small_plan
problems.DTYPE = torch.float32
plan = small_plan(json.loads(PLAN.read_text()), parts.PARTS)
small = {part: plan["sizes"][of] for part, of, *_ in plan["sweep"]}
for part, launch in json.loads(sys.argv[1]):
    sizes = {**small[part], "tokens": 20}
    problem = parts.make(Entry(part, part, sizes, ()), real=True)
    with sweep.launched_with(problem, launch):
        results = (problem.results or problem.call)()
        got, expected = (sweep.select(problem, list(r)) for r in (results, problem.expected()))
    assert sweep.is_right(got, expected), (part, launch)
    for i in range(len(expected)):
        wrong = [1.05 * t if i == j else t for j, t in enumerate(expected)]
        assert not sweep.is_right(got, wrong), part
    print(part)
"""


def test_what_is_timed_computes_what_torch_computes_and_so_does_each_launch_that_was_timed(gpu) -> None:
    timed = json.loads((REPOSITORY / "benchmarks/results/h100/sweep.json").read_text())["problems"]
    launches = {name: problem["launches"][0]["launch"] for name, problem in timed.items()}
    part_of = {
        name: f"attention_{name.split('_')[0]}" if name.split("_")[1].isdigit() else name
        for name in launches
        if "_" in name
    }
    cases = [(part_of.get(name, name), launch) for name, launch in launches.items()]
    parts = set(gpu("parts").PARTS)
    cases += [(part, {}) for part in sorted(parts - {part for part, _ in cases})]
    candidates = json.loads(gpu("sweep_plan").PLAN.read_text())["candidates"]
    by_torch, sort, sums = (
        dict(zip(candidates[name]["names"], candidates[name]["launches"][1], strict=True))
        for name in ("library", "sort", "sums")
    )
    cases += [("sort_pairs", sort), ("sum_choices", sums)]
    cases += [(part, by_torch) for part in ("gate_up", "d_hidden", "down", "d_activation")]
    assert {part for part, _ in cases} == parts
    folders = [str(REPOSITORY / name) for name in ("benchmarks", "torch-ext")]
    process = subprocess.run(
        [sys.executable, "-c", INTERPRETED, json.dumps(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.stdout.split() == [part for part, _ in cases], process.stderr[-3000:]
