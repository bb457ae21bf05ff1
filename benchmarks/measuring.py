"""Time, memory, and where and when they were measured: what the comparisons share."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


def replace(path: Path, text: str) -> None:
    """Write a file at once: an interrupt leaves the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


@contextmanager
def built_kernel() -> Iterator[Any]:
    """The kernel as users load it, built for the while."""
    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec
    from kernels import get_kernel

    with tempfile.TemporaryDirectory() as scratch:
        built = build(load_spec(REPOSITORY), Path(scratch, "build")).directory
        os.environ["LOCAL_KERNELS"] = f"org/scattermoe-lora={built}"
        yield get_kernel("org/scattermoe-lora", version=1)


def comparison_parser(description: str | None, devices: Sequence[str]) -> argparse.ArgumentParser:
    """The options that every comparison has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=devices, default="cpu")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    return parser


def chosen(
    parser: argparse.ArgumentParser, option: str, names: str | None, choices: Mapping[str, T]
) -> dict[str, T]:
    """The choices that an option names, separated by commas; all of them without names.

    Ends with the parser's error where one is unknown.
    """
    keys = names.split(",") if names else list(choices)
    if unknown := set(keys) - set(choices):
        parser.error(f"{option}: {', '.join(sorted(unknown))}: none of {', '.join(choices)}")
    return {key: choices[key] for key in keys}


def parse_cases(
    parser: argparse.ArgumentParser, cases: Mapping[str, Mapping[str, T]], seconds: float
) -> tuple[argparse.Namespace, dict[str, T]]:
    """The arguments of a comparison whose cases have names by device, and the cases that they choose.

    Ends with one line where the device is not there.
    """
    parser.add_argument(
        "--cases", help="; ".join(f"{device}: {', '.join(names)}" for device, names in cases.items())
    )
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"for the timing of a case; default {seconds:g}"
    )
    arguments = parser.parse_args()
    cases_chosen = chosen(parser, "--cases", arguments.cases, cases[arguments.device])
    require(arguments.device)
    return arguments, cases_chosen


def compare_cases(
    arguments: argparse.Namespace,
    cases: Mapping[str, T],
    measure: Callable[[Any, str, T], dict[str, Any]],
    ours: str = "scattermoe",
    **described: Any,
) -> None:
    """Measures and shows one case after the other, writes the figures, and fails where ours refused a case.

    Args:
        arguments: Of :func:`parse_cases`.
        cases: Those to measure.
        measure: Takes the kernel, a case's name and the case, prints its table and returns its rows.
        ours: The row that must not say ``not``.
        described: What else the figures say of the run.
    """
    import torch

    described = {"device": device_name(arguments.device), "threads": torch.get_num_threads(), **described}
    print(described["device"], flush=True)
    results: dict[str, Any] = {}
    with built_kernel() as kernel:
        for name, case in cases.items():
            results[name] = measure(kernel, name, case)
            write(arguments.output, {**described, "results": results})
    if refused := [name for name, rows in results.items() if "not" in rows[ours]]:
        sys.exit(f"scattermoe failed: {', '.join(refused)}")
