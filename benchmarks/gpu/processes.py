"""Commands side by side, each a process group of its own that ends with the time, or with this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

REPOSITORY = Path(__file__).resolve().parents[2]
# After being asked to end.
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """A command, by a name that its log and its outcome go by."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def python_path() -> str:
    """``PYTHONPATH`` with what the repository's programs import, and what the caller named."""
    folders = [str(REPOSITORY / name) for name in ("tools", "torch-ext", "benchmarks")]
    return os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH", "")]))


def run_all(jobs: Sequence[Job], logs: Path, until: float, at_once: int) -> dict[str, str]:
    """Run the jobs, ``at_once`` at a time, with their output in ``logs/<name>.log``, until ``until``.

    Returns:
        By name ``passed``, ``exit status 3``, ``cut off`` for one that the time ended, or ``no time`` for one that was
        not begun.
    """
    outcomes = dict.fromkeys((job.name for job in jobs), "no time")
    waiting, running = list(jobs), dict[str, subprocess.Popen[bytes]]()
    logs.mkdir(parents=True, exist_ok=True)
    # A process that is killed leaves what it put into a temporary folder; this one goes with the jobs.
    with TemporaryDirectory(prefix="gpu-") as scratch:
        try:
            while (waiting or running) and time.monotonic() < until:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[job.name] = _start(job, logs / f"{job.name}.log", scratch)
                    outcomes[job.name] = "cut off"
                for name, process in list(running.items()):
                    if (status := process.poll()) is not None:
                        outcomes[name] = "passed" if status == 0 else f"exit status {status}"
                        # What it has left behind.
                        end([running.pop(name)])
                time.sleep(0.02)
        finally:
            end(running.values())
    return outcomes


def _start(job: Job, log: Path, scratch: str) -> subprocess.Popen[bytes]:
    # A test of this that is a worker of pytest's own makes no worker of the job.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {
        **inherited,
        "PYTHONPATH": python_path(),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": scratch,
        **job.environment,
    }
    with log.open("wb") as output:
        output.write(f"$ {' '.join(job.command)}\n".encode())
        output.flush()
        return subprocess.Popen(
            job.command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End what is left of processes and of those that they started: ask first, wait a while, then kill."""
    processes = list(processes)
    try:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + GRACE_SECONDS
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0))
    finally:
        # Also where an interrupt ends the waiting, and where a process has left others behind.
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def end_children_when_ended() -> None:
    """Let the signals that end this process end the jobs that run, as an interrupt does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
