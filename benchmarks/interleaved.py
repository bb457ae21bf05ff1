"""Implementations of one case, measured in turns in one process, on the same tensors."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from measuring import (
    LAUNCHES,
    Alone,
    count_for,
    peak_memory,
    run_beside_others,
    seconds_each,
    start_memory,
)

Step = TypeVar("Step", bound=Callable[[], Any])


def finish(device: str) -> None:
    """Waits until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure_in_turns(
    makers: Mapping[str, Callable[[], Step]],
    describe: Callable[[Step], dict[str, Any]],
    device: str,
    seconds: float,
    alone: Alone = run_beside_others,
) -> dict[str, Any]:
    """Rows by implementation: the description of its step and its median time, or the reason why there is none.

    Args:
        makers: By name, a function that makes the step to be timed. It may fail, as may the step.
        describe: The other figures of a step's row. It runs the step, which is compiled and warm then.
        seconds: For the timing of all. A step is timed 3 to 200 times.
        alone: Runs what is timed when nothing else does. Where others fill the memory before, a step is described
            there.

    Returns:
        By name ``ms``, ``runs``, ``of_first`` (the median ratio to the first step of the same round, in which the
        machine was as busy for one as for the other) and the description; or only ``not``, the reason.
    """
    rows: dict[str, Any] = {name: {} for name in makers}
    steps: dict[str, Step] = {}
    short_of_memory: list[str] = []
    counts: dict[str, int] = {}

    def attempt(name: str, action: Callable[[str], None]) -> None:
        try:
            action(name)
        # Whatever an implementation refuses a case with, the others are to be measured.
        except Exception as error:  # noqa: BLE001 - Triton's errors are of no common kind
            message = str(error).strip() or "no reason given"
            rows[name] = {"not": f"{type(error).__name__}: {message.splitlines()[0][:90]}"}
            steps.pop(name, None)
            if isinstance(error, torch.OutOfMemoryError):
                short_of_memory.append(name)

    def prepare(name: str) -> None:
        step = makers[name]()
        rows[name] = describe(step)
        finish(device)
        steps[name] = step

    def count(name: str) -> None:
        counts[name] = count_for(steps[name], partial(finish, device), LAUNCHES[device])

    def timed() -> dict[str, list[float]]:
        names, short_of_memory[:] = [*short_of_memory], []
        for name in names:
            attempt(name, prepare)
        for name in [*steps]:
            attempt(name, count)
        times: dict[str, list[float]] = {name: [] for name in rows if name in steps}
        start, runs = time.perf_counter(), 0
        while times and runs < 200 and (runs < 3 or time.perf_counter() - start < seconds):
            for name, measured in times.items():
                measured.append(seconds_each(steps[name], partial(finish, device), counts[name]))
            runs += 1
        return times

    for name in makers:
        attempt(name, prepare)
    if device == "cuda":
        # For those who are timed meanwhile.
        torch.cuda.empty_cache()
    times: dict[str, list[float]] = alone(timed)
    first = next(iter(times.values()), [])
    for name, measured in times.items():
        ratios = [own / base for own, base in zip(measured, first, strict=True)]
        row = {"ms": 1000 * statistics.median(measured), "runs": len(measured)}
        rows[name].update(row, of_first=statistics.median(ratios))
    return rows


class FirstResults:
    """The results of a case's first implementation, with which the others' are compared."""

    def __init__(self) -> None:
        self._expected: list[torch.Tensor] | None = None

    def difference(self, results: Sequence[torch.Tensor]) -> float:
        """The largest error of a tensor, its norm over that of the first implementation's."""
        got = [tensor.detach().float().cpu() for tensor in results]
        self._expected = self._expected or got
        return max(float((g - e).norm() / e.norm()) for g, e in zip(got, self._expected, strict=True))


def against_first(device: str) -> Callable[[Callable[[], Sequence[torch.Tensor]]], dict[str, Any]]:
    """Describes steps by their peak memory above the inputs, and their results' difference from the first's."""
    first = FirstResults()

    def describe(step: Callable[[], Sequence[torch.Tensor]]) -> dict[str, Any]:
        difference = first.difference(step())
        return {"peak_bytes_above_inputs": peak_bytes(step, device), "difference": difference}

    return describe


@contextmanager
def without_stderr() -> Iterator[None]:
    """Drops the process's standard error, to which torch's profiler writes past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def process_peak(step: Callable[[], Any], device: str) -> int:
    """The most bytes that this process takes in ``step`` above those before it."""
    before = start_memory(device)
    step()
    finish(device)
    return peak_memory(device) - before


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most bytes that tensors made in ``step`` take at once, its results among them."""
    if device == "cuda":
        return process_peak(step, device)
    # The process as a whole also holds what the allocator kept of earlier implementations.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with without_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
