"""What the sweep times, from ``plan.json``: problems in order of worth, and the launches to try on each."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.card import read_lines

PLAN = Path(__file__).with_name("plan.json")
# Launches of a problem that one process compiles, and times in one turn: a turn begins with the problem's values.
IN_A_TURN = 4
Launch = Mapping[str, int]
Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A problem of the plan: its name, the part and the sizes it is made of, and the launches to try, best first."""

    name: str
    part: str
    sizes: Sizes
    candidates: tuple[Launch, ...]


def load_plan(path: Path = PLAN) -> list[Entry]:
    """The problems in order of worth. Each names lists of candidates, whose first three are also tried with each of the
    list's options."""
    plan = json.loads(path.read_text())
    entries = []
    for part, of, *lists in plan["sweep"]:
        launches: list[Launch] = []
        for candidates in map(plan["candidates"].__getitem__, filter(None, lists)):
            rows = [dict(zip(candidates["names"], row, strict=True)) for row in candidates["launches"]]
            launches += rows
            launches += [{**launch, **options} for options in candidates["options"] for launch in rows[:3]]
        entries.append(Entry(f"{part} {of}", part, plan["sizes"][of], tuple(launches)))
    return entries


def shares(entries: Sequence[Entry], workers: int) -> list[list[tuple[Entry, int]]]:
    """Each worker's turns, as a problem and the number of its turn, those worth most first.

    Every problem has a turn with the launch that ships, and as many as its candidates take.
    """
    turns = [
        (entry, number) for entry in entries for number in range(-(-(1 + len(entry.candidates)) // IN_A_TURN))
    ]
    return [turns[worker::workers] for worker in range(workers)]


def launches_of(entry: Entry, number: int, own: Launch) -> list[Launch]:
    """The launches of one turn of a problem: of the one that ships, and then the candidates that differ from it."""
    every = [own, *(launch for launch in entry.candidates if dict(launch) != dict(own))]
    return every[number * IN_A_TURN : (number + 1) * IN_A_TURN]


def collect(folder: Path, plan: Path) -> dict[str, Any]:
    """All results there are by problem, in the plan's order, the fastest launch first."""
    problems: dict[str, Any] = {}
    lines = [line for path in sorted(folder.glob("sweep-*.jsonl")) for line in read_lines(path)]
    order = {entry.name: position for position, entry in enumerate(load_plan(plan))}
    for line in sorted(lines, key=lambda line: order[line["problem"]]):
        problem = problems.setdefault(line["problem"], {**line["about"], "launches": []})
        problem["launches"].append(line["result"])
    for problem in problems.values():
        problem["launches"].sort(key=lambda entry: (entry["ms"] is None, entry["ms"] or 0))
    return problems


# A run without a GPU makes do with this.
SMALL = {
    "experts": 4, "hidden": 256, "intermediate": 128, "tokens": 32, "top_k": 2, "rank": 16,
    "length": 128, "head_dim": 64, "heads": 2, "key_heads": 1, "window": 64, "words": 300,
}  # fmt: skip
# One of each kind of problem: parts share their kernels.
PARTS = (
    "gate_up", "outer_a", "attention_forward", "attention_dq", "norm_forward", "logits_backward", "quantized_up",
    "decode", "gated_backward", "rms_backward",
)  # fmt: skip


def small_plan(plan: Mapping[str, Any], parts: Collection[str] = PARTS) -> dict[str, Any]:
    """The plan with one problem for each of some parts, on small sizes, and two candidates each."""
    sizes = {
        name: {key: value and SMALL.get(key, value) for key, value in of.items()}
        for name, of in plan["sizes"].items()
    }
    candidates = {
        name: {**given, "launches": given["launches"][-2:], "options": []}
        for name, given in plan["candidates"].items()
    }
    first = {entry[0]: entry for entry in reversed(plan["sweep"]) if entry[0] in parts}
    return {"sizes": sizes, "candidates": candidates, "sweep": [first[part] for part in parts]}


def write_small_plan(path: Path) -> Path:
    """The small plan as a file."""
    path.write_text(json.dumps(small_plan(json.loads(PLAN.read_text())), indent=2))
    return path
