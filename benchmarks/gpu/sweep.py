"""Times launches: processes compile their share side by side without launching, then time under one lock.

``python -m gpu.sweep WORKER WORKERS FOLDER COMPILE_UNTIL UNTIL [--dry]`` is one of the processes. Its results go to
``FOLDER/sweep-WORKER.jsonl``, each as it comes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from scattermoe_lora import ops
from scattermoe_lora.ops import tile_tables
from scattermoe_lora.ops.grouped_linear import library
from scattermoe_lora.ops.routing import Routing
from triton.runtime.errors import PTXASError
from triton.runtime.jit import JITFunction

from gpu.card import Turns, append_line
from gpu.parts import make
from gpu.problems import Problem, Tensors
from gpu.sweep_plan import PLAN, Entry, Launch, launches_of, load_plan, shares

# By how much a result may differ from torch's, as a share of the largest: rounding makes less of a difference, a lost
# block more.
CLOSE = 0.02
WRONG = "computes something else than torch"
# More than any GPU's cache.
FLUSHED_BYTES = 1 << 28
# Two milliseconds of a GPU, more than a host takes to issue a call.
BUSY_CYCLES = 4_000_000
# Of a launch so many samples, and as many in between as take so long.
FEWEST, MOST, SAMPLED_MS = 3, 30, 40.0
# Milliseconds of a call with this launch.
Clock = Callable[[Callable[[], object], Launch], float]


def folder_of(operator: str) -> Path:
    """The folder of an operator's tile tables, whether it has any or not."""
    return Path(ops.__path__[0]) / operator / "tiles"


def own_launch(problem: Problem, device: str) -> Launch:
    """The launch that the tables have for a problem; none where they have no rule for it."""
    folder = folder_of(problem.operator)
    if not folder.is_dir():
        return {}
    return tile_tables.lookup(folder, device, problem.kernel, problem.itemsize, problem.sizes) or {}


class Launcher:
    """Decides for the kernels of this process with what they are launched, and whether they are."""

    def __init__(self, never: bool = False) -> None:
        self._run, self._never = JITFunction.run, never
        self._compile_alone, self._timed = never, tuple[str, ...]()

    def __enter__(self) -> Launcher:
        launcher = self

        def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            if launcher._timed and function.fn.__name__ not in launcher._timed:
                return None
            warmup = warmup or launcher._compile_alone
            return launcher._run(function, *args, grid=grid, warmup=warmup, **options)

        self._patch = mock.patch.object(JITFunction, "run", run)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Kernels are compiled for what they are called with, and not launched; nor is torch's grouped product."""
        self._compile_alone = True
        try:
            with mock.patch.object(library, "product", unwritten_product):
                yield
        finally:
            self._compile_alone = self._never

    @contextmanager
    def only(self, kernels: tuple[str, ...]) -> Iterator[None]:
        """No other kernels run; all do if there are none."""
        self._timed = kernels
        try:
            yield
        finally:
            self._timed = ()


def unwritten_product(x: torch.Tensor, weight: torch.Tensor, routing: Routing, _: int | None) -> torch.Tensor:
    """Memory of the size of a product by torch, while others are timed on the card."""
    return x.new_empty(routing.order.shape[0], weight.shape[1])


@contextmanager
def launched_with(problem: Problem, launch: Launch) -> Iterator[None]:
    """The problem's kernel is launched with this, whatever the tables say."""
    lookup = tile_tables.lookup

    def chosen(folder: Path, device: str, kernel: str, *rest: Any) -> Launch | None:
        return dict(launch) if launch and kernel == problem.kernel else lookup(folder, device, kernel, *rest)

    with mock.patch.object(tile_tables, "lookup", chosen):
        yield


def is_right(results: Tensors, expected: Tensors) -> bool:
    """Tell whether results are torch's everywhere: integers as they are, others up to rounding."""
    return all(
        bool((got.float() - right.float()).abs().max() <= CLOSE * right.float().abs().max())
        if right.is_floating_point()
        else torch.equal(got, right)
        for got, right in zip(results, expected, strict=True)
    )


def cannot_run(error: Exception) -> str | None:
    """Why a launch cannot run, if that is what an error says; others are of the GPU, after which nothing can."""
    known = (triton.OutOfResources, triton.CompilationError, PTXASError, NotImplementedError, ValueError)
    # Of no kind of its own.
    if not isinstance(error, known) and "PassManager" not in str(error):
        return None
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"


def attempt(call: Callable[[], float | None]) -> dict[str, Any]:
    """``{"ms": ...}`` of a call, None with an ``error`` where it cannot run or (it returns None) is wrong."""
    try:
        milliseconds = call()
    except Exception as error:
        reason = cannot_run(error)
        if reason is None:
            raise
        return {"ms": None, "error": reason}
    return {"ms": None, "error": WRONG} if milliseconds is None else {"ms": milliseconds}


class Worker:
    """One process of the sweep."""

    def __init__(
        self, turns: Turns, results: Path, launcher: Launcher, clock: Clock, device: str, checks: bool
    ) -> None:  # fmt: skip
        self.turns, self.results, self.launcher = turns, results, launcher
        self.clock, self.device, self.checks = clock, device, checks

    def run(self, share: Sequence[tuple[Entry, int]], compile_until: float, until: float) -> None:
        """Compile a share until one time, then time what was compiled until the other."""
        compiled = []
        for entry, number in share:
            if time.monotonic() < compile_until:
                compiled.append((entry, self.compile(entry, number, compile_until)))
                free()
        for entry, launches in compiled:
            with self.turns.alone():
                if time.monotonic() < until and launches:
                    self.time(entry, launches, until)
                free()

    def compile(self, entry: Entry, number: int, until: float) -> list[Launch]:
        """Those launches of a turn that compile in time. One that does not compile is a result."""
        problem, compiled = make(entry, real=False), []
        for launch in launches_of(entry, number, own_launch(problem, self.device)):
            if time.monotonic() >= until:
                break
            result = attempt(partial(self.compile_one, problem, launch))
            if result["ms"] is None:
                self.keep(entry, problem, launch, result)
            else:
                compiled.append(launch)
        return compiled

    def compile_one(self, problem: Problem, launch: Launch) -> float:
        """Compile a launch, in no time that counts."""
        with self.launcher.compiling(), launched_with(problem, launch):
            problem.call()
        return 0.0

    def time(self, entry: Entry, launches: Sequence[Launch], until: float) -> None:
        """Time launches that were compiled, each only if it computes what torch computes."""
        problem = make(entry, real=True)
        expected = problem.expected() if self.checks else []
        for launch in launches:
            if time.monotonic() < until:
                result = attempt(partial(self.time_one, problem, expected, launch))
                self.keep(entry, problem, launch, result)

    def time_one(self, problem: Problem, expected: Tensors, launch: Launch) -> float | None:
        """Milliseconds of a launch; None if it computes something else than is expected."""
        with launched_with(problem, launch):
            results = (problem.results or problem.call)()
            if self.checks and not is_right(select(problem, results), select(problem, expected)):
                return None
            with self.launcher.only(problem.timed):
                return self.clock(problem.call, launch)

    def keep(self, entry: Entry, problem: Problem, launch: Launch, result: Mapping[str, Any]) -> None:
        """Write a result, with what the problem is."""
        own = dict(launch) == dict(own_launch(problem, self.device))
        about = {
            "operator": problem.operator, "kernel": problem.kernel, "sizes": dict(problem.sizes),
            "itemsize": problem.itemsize,
            "gflop": problem.flop / 1e9, "mb": problem.bytes / 1e6,
        }  # fmt: skip
        entry_result = {**result, "launch": dict(launch), "ships": own}
        append_line(self.results, {"problem": entry.name, "about": about, "result": entry_result})


def free() -> None:
    """Give the card's memory back: other processes have problems, too."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def select(problem: Problem, results: Tensors) -> Tensors:
    """The results that the problem's kernel is responsible for: of attention's backward, one or two of three."""
    chosen = {"attention_dq": slice(0, 1), "attention_dkdv": slice(1, 3)}.get(problem.kernel, slice(None))
    return results[chosen]


def by_events(call: Callable[[], object], launch: Launch) -> float:
    """The GPU's clock: the median of some 40 milliseconds, with nothing of the operands in its cache.

    The card is kept busy while the host issues a call, whose own time, on slow processors longer than a small kernel's,
    is then in none.
    """
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8)
    times: list[float] = []
    while len(times) < FEWEST or (len(times) < MOST and sum(times) < SAMPLED_MS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def made_up(call: Callable[[], object], launch: Launch) -> float:
    """A clock without a GPU: the same launch takes the same time."""
    call()
    return 1 + hashlib.sha256(json.dumps(dict(launch), sort_keys=True).encode()).digest()[0] / 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("worker", type=int)
    parser.add_argument("workers", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("compile_until", type=float)
    parser.add_argument("until", type=float)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    turns = Turns(given.folder, f"sweep-{given.worker}")
    torch.manual_seed(0)
    if given.dry:
        from gpu import simulated

        device, clock = simulated.install(), made_up
    else:
        torch.set_default_device("cuda")
        device, clock = tile_tables.table_of(torch.device("cuda", torch.cuda.current_device())), by_events
    share = shares(load_plan(given.plan), given.workers)[given.worker]
    with Launcher(never=given.dry) as launcher:
        results = given.folder / f"{turns.name}.jsonl"
        worker = Worker(turns, results, launcher, clock, device, checks=not given.dry)
        worker.run(share, given.compile_until, given.until)


if __name__ == "__main__":
    main()
