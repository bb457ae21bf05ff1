"""Tile tables with what a sweep found fastest, written as they ship."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring import replace
from scattermoe_lora.ops.tile_tables import parse_rule

# A launch that is faster than the one that ships by less than this may owe it to chance.
FASTER = 0.98
# By how much smaller and larger the sizes are that a rule serves beside the one that was timed.
FACTORS = {"rows": 2, "pairs": 2, "experts": 2, "n": math.sqrt(2), "k": math.sqrt(2)}


def fastest(problem: Mapping[str, Any]) -> Mapping[str, int] | None:
    """The launch to take for a problem: the fastest, unless the one that ships is as fast.

    None if none was timed, or if time ran out for the one that ships: an earlier timing may have chosen it.
    """
    timed = [entry for entry in problem["launches"] if entry["ms"] is not None]
    if not timed or not any(entry["ships"] for entry in problem["launches"]):
        return None
    best = min(timed, key=lambda entry: entry["ms"])
    ships = [entry for entry in timed if entry["ships"] and best["ms"] > FASTER * entry["ms"]]
    launch: Mapping[str, int] = (ships or [best])[0]["launch"]
    return launch


def limits(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The limits of a rule that serves sizes like these, up to one of the :data:`FACTORS`.

    A head's size is what its blocks are made for; a rank of 16 is the least that is multiplied.
    """
    around: dict[str, Any] = {}
    for name, size in sizes.items():
        if isinstance(size, bool):
            # A rule for both kinds is not what was timed; keys that are the values have rules of their own.
            if name != "same_kv":
                around[name] = size
        elif name not in FACTORS:
            around[name] = size
        elif size <= 16 and name in ("n", "k"):
            around[name] = 16
        else:
            around[name] = [math.ceil(size / FACTORS[name]), math.floor(size * FACTORS[name])]
    return around


def serves(rule: Mapping[str, Any], sizes: Mapping[str, Any], itemsize: int = 2) -> bool:
    """Tell whether a rule, as a table's file has it, holds for these sizes."""
    return parse_rule(rule).serves(itemsize, sizes)


def with_rule(
    rules: list[dict[str, Any]], problem: Mapping[str, Any], launch: Mapping[str, int], timing: str
) -> None:
    """Let a problem's sizes be served by a rule with this launch: in the place of one for the same sizes, else before
    the first that serves them, else at the end, as with kernels that stand in for torch's operators."""
    itemsize, sizes = problem.get("itemsize", 2), problem["sizes"]
    rule = {"bytes": itemsize, **limits(sizes), "launch": dict(launch), "measured": timing}
    serving = (position for position, other in enumerate(rules) if serves(other, sizes, itemsize))
    place = next(serving, len(rules))
    described = ("launch", "measured")
    before = [{name: value for name, value in other.items() if name not in described} for other in rules]
    if before[place:] and before[place] == {name: rule[name] for name in rule if name not in described}:
        rules[place] = rule
    else:
        rules.insert(place, rule)


def render(table: Mapping[str, Any]) -> str:
    """A table's file, one rule a line."""
    parts = [f'  "measured": {json.dumps(table["measured"])}']
    for kernel, rules in table.items():
        if kernel != "measured":
            lines = ",\n".join(f"    {json.dumps(rule)}" for rule in rules)
            parts.append(f'  "{kernel}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def updated(
    table: Mapping[str, Any], problems: Mapping[str, Any], name: str, timing: Mapping[str, Any]
) -> dict[str, Any]:
    """A table with rules for the problems of a sweep, whose ``timing`` goes by ``name``; what it did not time stays."""
    result = {kernel: list(rules) for kernel, rules in table.items() if kernel != "measured"}
    for problem in problems.values():
        launch = fastest(problem)
        if launch:
            with_rule(result.setdefault(problem["kernel"], []), problem, launch, name)
    timings = {**(table["measured"] or {}), name: dict(timing)}
    named = {rule.get("measured") for rules in result.values() for rule in rules}
    return {"measured": {key: value for key, value in timings.items() if key in named}, **result}


def write(
    problems: Mapping[str, Any], ops: Path, device: str, folder: Path, name: str, timing: Mapping[str, Any]
) -> list[Path]:
    """Write the device's tables of all operators that were timed to ``folder/<operator>/tiles/<device>.json``.

    Args:
        problems: Of a sweep.
        ops: The folder of the operators whose tables are taken over.
    """
    written = []
    for operator in sorted({problem["operator"] for problem in problems.values()}):
        source = ops / operator / "tiles" / f"{device}.json"
        if source.exists():
            own = {key: value for key, value in problems.items() if value["operator"] == operator}
            path = folder / operator / "tiles" / source.name
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, render(updated(json.loads(source.read_text()), own, name, timing)))
            written.append(path)
    return written
