"""Time, memory, and where and when they were measured: what the comparisons share."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

REPOSITORY = Path(__file__).resolve().parents[1]

T = TypeVar("T")
Alone = Callable[[Callable[[], Any]], Any]
"""Runs what is timed, and returns its result."""


def run_beside_others(timed: Callable[[], T]) -> T:
    """What is timed, whatever else runs."""
    return timed()


def status(field: str) -> int:
    """A size from Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# A GPU is given its next step while it computes one. Steps of less than a few milliseconds that are waited for one by
# one would be timed with their launches, which no training step waits for.
LAUNCHES = {"cpu": 0.0, "cuda": 0.01}


def seconds_each(step: Callable[[], Any], finish: Callable[[], None], count: int) -> float:
    """Seconds of one of ``count`` steps in a row."""
    begin = time.perf_counter()
    for _ in range(count):
        step()
    finish()
    return (time.perf_counter() - begin) / count


def count_for(step: Callable[[], Any], finish: Callable[[], None], least: float) -> int:
    """The number of steps in a row that take ``least`` seconds: 1, 2, 4 ..."""
    count = 1
    while least and count * seconds_each(step, finish, count) < least:
        count *= 2
    return count


def median_seconds(
    step: Callable[[], Any],
    finish: Callable[[], None],
    repeats: int = 7,
    budget: float = 30.0,
    steady: float = 0.0,
    least: float = 0.0,
) -> tuple[float, int]:
    """Median seconds of ``step``, and the number of runs that it is the median of.

    The first run warms up and is not counted. At least ``repeats`` runs follow, and as many more as ``steady`` seconds
    hold (a few dozen milliseconds are soon disturbed); but none begins after ``budget`` seconds. ``finish`` waits until
    the device is done; a run is as many steps as take ``least`` seconds.
    """
    start = time.perf_counter()
    step()
    finish()
    count = count_for(step, finish, least)
    seconds: list[float] = []
    while not seconds or (
        time.perf_counter() - start < budget and (len(seconds) < repeats or count * sum(seconds) < steady)
    ):
        seconds.append(seconds_each(step, finish, count))
    return statistics.median(seconds), len(seconds)


def require(device: str) -> None:
    """Ends with one line where ``device`` is a GPU that torch does not find."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"error: --device cuda: torch {torch.__version__} finds no GPU")


def device_name(device: str) -> str:
    """The GPU's name, or the processor's as Linux gives it, with its number of cores."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def start_memory(device: str) -> int:
    """Forgets the peak so far and returns the bytes in use."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_memory(device: str) -> int:
    """The most bytes in use since :func:`start_memory`."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def commit() -> str | None:
    """The commit that is checked out, ``-dirty`` behind it where files differ; None where git cannot say: in a copy
    without the repository, without git, or where the repository is another user's."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return process.stdout.strip() or None


def installed(name: str) -> str | None:
    """The version of a package, or None. Triton goes by other names with torch for AMD."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def provenance() -> dict[str, Any]:
    """The date, the versions and the commit that figures belong to."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {
            name: installed(name) for name in ("torch", "triton", "transformers", "peft", "kernels")
        },
    }


def write(output: Path | None, figures: Mapping[str, Any]) -> None:
    """Writes the figures so far as JSON, if anywhere. After each row: a GPU's time may end before the last one."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**provenance(), **figures}, indent=2) + "\n")
