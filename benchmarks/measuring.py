"""Time, memory, and where and when they were measured: what the comparisons share."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def status(field: str) -> int:
    """A size from Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def median_seconds(
    step: Callable[[], Any],
    finish: Callable[[], None],
    repeats: int = 7,
    budget: float = 30.0,
    steady: float = 0.0,
) -> tuple[float, int]:
    """Median seconds of ``step``, and the number of runs that it is the median of.

    The first run warms up and is not counted. At least ``repeats`` runs follow, and as many more as ``steady`` seconds
    hold (a few dozen milliseconds are soon disturbed); but none begins after ``budget`` seconds. ``finish`` waits until
    the device is done.
    """
    start = time.perf_counter()
    step()
    finish()
    seconds: list[float] = []
    while not seconds or (
        time.perf_counter() - start < budget and (len(seconds) < repeats or sum(seconds) < steady)
    ):
        begin = time.perf_counter()
        step()
        finish()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), len(seconds)


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


def provenance() -> dict[str, Any]:
    """The date, the versions and the commit that figures belong to."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": done.stdout.strip(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers", "peft", "kernels")},
    }
