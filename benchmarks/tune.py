"""Times tile configurations on this machine's GPU, prints what it found and writes them for the kernel to ship.

    PYTHONPATH=torch-ext python benchmarks/tune.py [--output FILE] [--minutes N] [--install]

For every rule of the device's table, those of two bytes first, the candidates are timed on a shape that the rule
serves (a wide product's on those of a layer with LoRA together); the fastest replaces the rule's launch. A candidate
that does not fit the GPU, or computes something else than torch, is left out. Routing is uniform: each expert has
equally many rows. ``--output`` is written after every rule; rules that ``--minutes`` leaves no time for keep their
launches. ``--install`` writes the table over the one that ships, in the end.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from scattermoe_lora.ops import tile_tables as tiles
from scattermoe_lora.ops.grouped_linear import gpu
from scattermoe_lora.ops.grouped_linear.gpu import TILES
from triton.runtime.errors import PTXASError
from triton.testing import do_bench
from tune_problems import Problem, is_layer, problem

SIDES = (16, 32, 64, 128, 256)
# How many tiles, and then launches, are looked at again.
BEST_TILES, BEST_LAUNCHES = 3, 3
# Of a candidate and one product, by bytes of an element; nearly all of it to compile. An average: measured on one core
# were 0.3 to 1.0 for bfloat16, and for float32 1.3 for small tiles, 5 for large ones.
SECONDS = {2: 0.7, 4: 2.5}
# By how much a result may differ from torch's, as a share of the largest: rounding makes less of a difference, a lost
# block more.
CLOSE = 0.02
# A launch that is faster by less than this may owe it to chance.
FASTER = 0.98

Launch = dict[str, int]
# Milliseconds of a launch, or None where it cannot run; measured for longer where that is asked for.
Timer = Callable[[Launch, bool], "float | None"]


@dataclass(frozen=True)
class Tuned:
    """The result of tuning one rule: milliseconds of the launch it had, and of the fastest; None where not timed."""

    kernel: str
    rule: tiles.Rule
    before: float | None
    launch: Launch
    after: float | None


def candidates(kernel: str, rule: tiles.Rule) -> Iterator[Launch]:
    """Launches worth timing: blocks that the rule's shapes fill, and 2 to 128 results a thread, of whose 255 registers
    the rest holds addresses."""
    sides, limits = ("BLOCK_M", "BLOCK_N", "BLOCK_K"), ("rows", "n")
    if kernel == "grouped_outer":
        sides, limits = ("BLOCK_P", "BLOCK_Q", "BLOCK_S"), ("k", "n")
    ordering = {name: value for name, value in rule.launch.items() if name == "GROUP_M"}
    # A size without a limit is large, and fills at least 64.
    first, second = (
        [s for s in SIDES if (s >= 64 if limit is None else s <= max(16, limit))]
        for limit in map(rule.limits.get, limits)
    )
    for blocks in itertools.product(first, second, (16, 32, 64, 128)):
        for warps, stages in itertools.product((4, 8), (2, 3, 4)):
            if 2 <= blocks[0] * blocks[1] / (32 * warps) <= 128:
                launch = {**dict(zip(sides, blocks, strict=True)), **ordering}
                yield {**launch, "num_warps": warps, "num_stages": stages}


def tile(launch: Launch) -> tuple[int, ...]:
    """A launch's blocks; the first two are those of the result."""
    return tuple(value for name, value in launch.items() if name.startswith("BLOCK"))


def results_a_thread(launch: Launch) -> float:
    rows, columns, _ = tile(launch)
    return rows * columns / (32 * launch["num_warps"])


def search(launches: Sequence[Launch], clock: Timer) -> list[tuple[float, Launch]]:
    """The fastest few of ``launches`` and their milliseconds, fastest first, without timing them all.

    Each tile is timed with three stages (two where they do not fit) and as few warps as leave a thread at most 64
    results; the best tiles with every number of warps and stages; and the best of all these again, for longer.
    """
    by_tile: dict[tuple[int, ...], list[int]] = {}
    for index, launch in enumerate(launches):
        by_tile.setdefault(tile(launch), []).append(index)
    timed: dict[int, float] = {}

    def look(index: int) -> bool:
        milliseconds = clock(launches[index], False)
        if milliseconds is not None:
            timed[index] = milliseconds
        return milliseconds is not None

    def best(count: int) -> list[int]:
        return sorted(timed, key=timed.__getitem__)[:count]

    def heavy(index: int) -> tuple[bool, int]:
        return results_a_thread(launches[index]) > 64, launches[index]["num_warps"]

    for same in by_tile.values():
        for stages in (3, 2):
            if look(min((index for index in same if launches[index]["num_stages"] == stages), key=heavy)):
                break
    for chosen in best(BEST_TILES):
        for index in by_tile[tile(launches[chosen])]:
            if index not in timed:
                look(index)
    again = [(clock(launches[index], True), launches[index]) for index in best(BEST_LAUNCHES)]
    return sorted(((ms, launch) for ms, launch in again if ms is not None), key=lambda pair: pair[0])


@contextmanager
def launched(launch: Mapping[str, int]) -> Iterator[None]:
    with mock.patch.object(gpu, "tile", return_value=launch):
        yield


def milliseconds(call: Callable[[], Sequence[torch.Tensor]], launch: Launch, longer: bool) -> float | None:
    """Median time of ``call`` with this launch, or None where the GPU cannot run it."""
    with launched(launch):
        try:
            return float(do_bench(call, *((25, 100) if longer else (1, 10)), return_mode="median"))
        except (triton.OutOfResources, triton.CompilationError, PTXASError):
            return None
        except RuntimeError as error:
            # Of no kind of its own.
            if "PassManager" not in str(error):
                raise
            return None


def is_right(products: Problem, launch: Launch) -> bool:
    """Tell whether a launch computes what torch computes, everywhere."""
    with launched(launch):
        pairs = list(zip(products.call(), products.expected, strict=True))
    return all(bool((got - right).abs().max() <= CLOSE * right.abs().max()) for got, right in pairs)


def tune(kernel: str, rule: tiles.Rule, until: float = math.inf) -> Tuned:
    """Time the candidates for one rule, and the launch that it has. From ``until`` on no candidate is timed."""
    products = problem(kernel, rule)

    def clock(launch: Launch, longer: bool) -> float | None:
        return milliseconds(products.call, launch, longer) if time.monotonic() < until else None

    own = dict(rule.launch)
    results = search(list(candidates(kernel, rule)), clock)
    # After the others, when the GPU is as warm as it was for them; and whatever the time, for none is taken unseen.
    before = milliseconds(products.call, own, True) if results else None
    for took, launch in results:
        if before is not None and took >= FASTER * before:
            break
        if is_right(products, launch):
            return Tuned(kernel, rule, before, launch, took)
        print(f"{kernel}: {launch} computes something else than torch", flush=True)
    return Tuned(kernel, rule, before, own, before)


def render(measured: Mapping[str, str] | None, results: list[Tuned]) -> str:
    """The table's file, one rule a line, as :func:`scattermoe_lora.ops.tile_tables.load` reads it."""
    parts = [f'  "measured": {json.dumps(measured)}']
    for kernel, group in itertools.groupby(results, key=lambda result: result.kernel):
        lines = [
            "    " + json.dumps({"bytes": e.rule.bytes, **e.rule.limits, "launch": e.launch}) for e in group
        ]
        parts.append(f'  "{kernel}": [\n' + ",\n".join(lines) + "\n  ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def estimate(rules: Sequence[tuple[str, tiles.Rule]]) -> tuple[int, float]:
    """About how many launches are timed for the rules, and the minutes that takes."""
    counts = [len({tile(launch) for launch in candidates(*rule)}) + 5 * BEST_TILES for rule in rules]
    seconds = (
        count * SECONDS[rule[1].bytes] * (3 if is_layer(*rule) else 1)
        for count, rule in zip(counts, rules, strict=True)
    )
    return sum(counts), sum(seconds) / 60


def tune_all(
    rules: Sequence[tuple[str, tiles.Rule]],
    minutes: float,
    keep: Callable[[list[Tuned]], None],
    one: Callable[[str, tiles.Rule, float], Tuned] = tune,
) -> list[Tuned]:
    """Tunes rule by rule, those of two bytes first, and hands ``keep`` the table so far, in the order of ``rules``,
    which is also the result. From ``minutes`` on rules keep their launches."""
    begin = time.monotonic()
    until = begin + 60 * minutes
    results = [Tuned(kernel, rule, None, dict(rule.launch), None) for kernel, rule in rules]
    for count, i in enumerate(sorted(range(len(rules)), key=lambda i: rules[i][1].bytes)):
        if time.monotonic() >= until:
            print(
                f"{len(rules) - count} of {len(rules)} rules keep their launches: the time is up", flush=True
            )
            break
        kernel, rule = rules[i]
        results[i] = result = one(kernel, rule, until)
        times = ["none" if ms is None else f"{ms:.4f}" for ms in (result.before, result.after)]
        shape = f"bytes {rule.bytes}, " + ", ".join(f"{name} {limit}" for name, limit in rule.limits.items())
        print(
            f"{time.monotonic() - begin:>4.0f} s  {kernel} {shape}: {times[0]} -> {times[1]} ms, {result.launch}",
            flush=True,
        )
        keep(results)
    return results


def own_table() -> str:
    """The name of the table that is this GPU's alone, whether there is one or not."""
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def write(path: Path, results: list[Tuned]) -> None:
    """The table into a file, at once: an interrupt leaves the old one or the new one."""
    measured = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rules": f"{sum(result.after is not None for result in results)} of {len(results)}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(render(measured, results))
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the table here")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time nothing more after as many")
    parser.add_argument("--install", action="store_true", help="write over the table that this GPU takes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: tuning times kernels on a GPU, and this machine has none")
    device = tiles.table_of(torch.device("cuda", torch.cuda.current_device()))
    if arguments.install and device != own_table():
        sys.exit(
            f"error: --install: {own_table()} has no table of its own; {device}, which it takes, serves others, too"
        )
    rules = [(kernel, rule) for kernel, rules in tiles.load(TILES, device).rules.items() for rule in rules]
    count, minutes = estimate(rules)
    print(f"{device}: {len(rules)} rules, {count} launches to time: about {minutes:.0f} minutes", flush=True)

    def keep(results: list[Tuned]) -> None:
        if arguments.output:
            write(arguments.output, results)

    results = tune_all(rules, arguments.minutes, keep)
    if arguments.install:
        write(TILES / f"{device}.json", results)


if __name__ == "__main__":
    main()
