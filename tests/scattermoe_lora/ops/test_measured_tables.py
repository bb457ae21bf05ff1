"""A rule of a tile table that claims to be timed launches what was fastest, in a file of this repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
OPERATORS = sorted(path.parent.name for path in REPOSITORY.glob("torch-ext/scattermoe_lora/ops/*/tiles"))


@pytest.fixture(scope="module")
def tables(submodule):
    """Every table that ships: ``(folder, device, table)``."""
    tiles = submodule("ops.tile_tables")
    folders = [submodule(f"ops.{operator}.gpu").TILES for operator in OPERATORS]
    return [(folder, device, tiles.load(folder, device)) for folder in folders for device in tiles.DEVICES]


def figures(timing) -> dict:
    return json.loads((REPOSITORY / timing.figures).read_text())


def problems(timing, table) -> list[dict]:
    """The problems of a timing that the kernels of a table solve."""
    return [problem for problem in figures(timing)["problems"].values() if problem["kernel"] in table.rules]


def test_a_timing_is_that_of_the_file_that_it_names(tables) -> None:
    timings = [timing for *_, table in tables for timing in table.measured.values()]
    assert timings
    for timing in timings:
        content = figures(timing)
        assert (timing.device, timing.date) == (content["device"], content["date"])
        assert {"torch": timing.torch, "triton": timing.triton}.items() <= content["versions"].items()
        assert timing.commit is None or content["commit"].startswith(timing.commit)


def test_what_was_timed_is_launched_with_what_was_fastest(tables, submodule) -> None:
    lookup = submodule("ops.tile_tables").lookup
    compared = 0
    for folder, device, table in tables:
        for name, timing in table.measured.items():
            for problem in problems(timing, table):
                sizes, kernel, itemsize = problem["sizes"], problem["kernel"], problem.get("itemsize", 2)
                rule = next((rule for rule in table.rules[kernel] if rule.serves(itemsize, sizes)), None)
                # A later timing may have taken over the problem, and torch's operators may be as fast.
                if rule is None or rule.measured != name:
                    continue
                launch = lookup(folder, device, kernel, itemsize, sizes)
                times = [entry["ms"] for entry in problem["launches"] if entry["ms"] is not None]
                (own,) = [entry["ms"] for entry in problem["launches"] if entry["launch"] == launch]
                # What is faster by less than that owes it to chance, and the launch that shipped stays.
                assert min(times) > 0.98 * own or own == min(times), (kernel, sizes)
                compared += 1
    assert compared


def test_a_rule_that_names_a_timing_serves_a_problem_of_it_and_sizes_like_it(tables) -> None:
    for _, _, table in tables:
        for kernel, rules in table.rules.items():
            for rule in rules:
                timing = table.timing(rule)
                if timing is None:
                    continue
                served = [
                    problem["sizes"]
                    for problem in problems(timing, table)
                    if problem["kernel"] == kernel
                    and rule.serves(problem.get("itemsize", 2), problem["sizes"])
                ]
                assert served, dict(rule.limits)
                for name, limit in rule.limits.items():
                    if isinstance(limit, tuple):
                        # No more than twice or half.
                        assert any(limit[1] <= 2 * sizes[name] <= 4 * limit[0] for sizes in served)


def test_what_no_timing_is_named_for_says_so_rule_by_rule(tables) -> None:
    for folder, device, _ in tables:
        content = json.loads((folder / f"{device}.json").read_text())
        assert isinstance(content.pop("measured"), dict)
        for rules in content.values():
            assert all("measured" in rule for rule in rules)
