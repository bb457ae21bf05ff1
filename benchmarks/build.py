"""Processor seconds of a cold build: of a package of 300 files of 300 lines, and of this repository's own kernel.

    python benchmarks/build.py [--runs N]

Each build is a process of its own, so that Python's start and imports count; the best of the runs is printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = LINES = 300
BUILD_TOML = """\
[general]
name = "bench-kernel"
version = 1
edition = 5
license = "MIT"
backends = ["cpu", "cuda", "rocm", "xpu"]

[torch-noarch]
"""
HEAD = """\
import torch
import bench_kernel.m{after} as after
from torch import library as lib


@lib.custom_op("bench_kernel::op{number}", mutates_args=())
def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
"""


def write_package(root: Path) -> None:
    """Write a kernel whose modules import each other and define an operator each."""
    package = root / "torch-ext" / "bench_kernel"
    package.mkdir(parents=True)
    (root / "build.toml").write_text(BUILD_TOML)
    (package / "__init__.py").write_text("__all__ = []\n")
    for number in range(FILES):
        head = HEAD.format(number=number, after=(number + 1) % FILES)
        lines = LINES - head.count("\n") - 1
        body = "".join(f"    a{line} = torch.relu(x) * {line} + y[{line}:]\n" for line in range(lines))
        (package / f"m{number}.py").write_text(f"{head}{body}    return x\n")


def processor_seconds() -> float:
    """Processor time of all processes that this one has waited for: whatever else the machine does is left out."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(root: Path, runs: int) -> float:
    """The fewest processor seconds of several builds, each of which finds no build before it."""
    measured = []
    for _ in range(runs):
        shutil.rmtree(root / "build", ignore_errors=True)
        start = processor_seconds()
        command = [sys.executable, "-m", "kernelpress", "build", str(root)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        measured.append(processor_seconds() - start)
    return min(measured)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as scratch:
        many, own = Path(scratch, "many"), Path(scratch, "own")
        write_package(many)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / "torch-ext", own / "torch-ext", ignore=ignored)
        for name in ("build.toml", "CARD.md"):
            shutil.copy(REPOSITORY / name, own / name)
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
        print(f"cold build of {FILES} files of {LINES} lines: {measure(many, runs):.2f} s of the processor")
        print(f"cold build of this repository's kernel: {measure(own, runs):.2f} s of the processor")


if __name__ == "__main__":
    main()
