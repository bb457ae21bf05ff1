"""The worker process that loads kernels: it has torch, the loader and the standard library, and none of the project.

It imports torch and the loader once and then splits off a process for each variant, so that each finds them as after
its own import, and none waits for it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import loading

_TIMEOUT = 300.0
# A process that loads a kernel and what it imports of torch may need 500 MB.
_PARALLEL = 2


def main(jobs_file: str, report: str = "") -> None:
    """Do the jobs of a list, two at a time, and report on each.

    Args:
        jobs_file: JSON, a list of jobs.
        report: The file to write; without it, ``jobs_file`` holds the single job of a process that is started anew.
    """
    import kernels  # type: ignore[import-untyped]  # noqa: F401
    import torch  # noqa: F401

    jobs = json.loads(Path(jobs_file).read_text("utf-8"))
    if not report:
        loading.run_job(jobs)
        return
    first = range(len(jobs))
    imports: dict[str, int] = {}
    without_triton: dict[int, int] = {}

    def follow_up(number: int, answer: dict[str, Any]) -> None:
        """Add the jobs that the result of another calls for."""
        job = jobs[number]
        if job["kind"] != "load" or "crashed" in answer:
            return
        if answer["effects"] or any(op.partition("::")[0] != job["id"] for op in answer["ops"]):
            # The variants of a kernel import the same modules, as a rule.
            key = "\n".join(answer["modules"])
            if key not in imports:
                imports[key] = len(jobs)
                jobs.append(job | {"kind": "import modules", "modules": answer["modules"]})
        if answer["error"] is None and answer["triton"] and job["cpu"]:
            without_triton[number] = len(jobs)
            jobs.append(job | {"kind": "load without triton"})

    answers = _run_all(jobs, follow_up)
    for number in first:
        answer = answers[number]
        if "crashed" in answer:
            continue
        alone = answers[without_triton[number]] if number in without_triton else {"error": None}
        answer["without_triton"] = alone.get("crashed") or alone["error"]
        key = "\n".join(answer["modules"])
        others = answers[imports[key]] if key in imports else {}
        # What the modules do that a kernel imports is not for its author to mend.
        answer["ops"] = [op for op in answer["ops"] if op not in others.get("ops", ())]
        answer["effects"] = [
            effect for effect in answer["effects"] if effect not in others.get("effects", ())
        ]
    loading.write(Path(report), answers[: len(first)])


def _run_all(
    jobs: list[dict[str, Any]], follow_up: Callable[[int, dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Do jobs, each in a process of its own; ``follow_up`` may add some when one is done."""
    answers: list[dict[str, Any]] = []
    running: dict[int, tuple[Any, Callable[[], int | None], float]] = {}
    while len(answers) < len(jobs) or running:
        while len(answers) < len(jobs) and len(running) < _PARALLEL:
            running[len(answers)] = *_start(jobs[len(answers)]), time.monotonic() + _TIMEOUT
            answers.append({})
        for number, (process, poll, end) in list(running.items()):
            late = time.monotonic() > end
            if late:
                process.kill()
            status = poll()
            if status is not None:
                how = (
                    f"not done after {_TIMEOUT:.0f} s" if late else f"the process ended with status {status}"
                )
                answers[number] = _answer(loading.folder_of(jobs[number]), how)
                del running[number]
                follow_up(number, answers[number])
        time.sleep(0.01)
    return answers


def _start(job: dict[str, Any]) -> tuple[Any, Callable[[], int | None]]:
    """Start a copy of this process, or another Python where there is no fork; with it, a function for its status."""
    folder = loading.folder_of(job)
    folder.mkdir(parents=True)
    if hasattr(os, "fork"):
        copy = multiprocessing.get_context("fork").Process(target=_in_copy, args=(job,))
        copy.start()
        return copy, lambda: copy.exitcode
    loading.write(folder / "job.json", job)
    with (folder / "stderr").open("wb") as stderr:
        other = subprocess.Popen(
            [*sys.orig_argv[:-2], str(folder / "job.json")],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )
    return other, other.poll


def _in_copy(job: dict[str, Any]) -> None:
    code = 1
    try:
        os.chdir(loading.folder_of(job))
        with open("stderr", "wb") as stderr:
            os.dup2(stderr.fileno(), 2)
        loading.run_job(job)
        code = 0
    except BaseException:  # noqa: BLE001 - it is what the process ends with, and its last line is the answer
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # Waits for no thread and no process that the kernel has started.
        os._exit(code)


def _answer(folder: Path, end: str) -> dict[str, Any]:
    lines = (folder / "stderr").read_text("utf-8", "replace").strip().splitlines() or ["no message"]
    report = folder / "report.json"
    if report.is_file():
        # It is written once before the operators are called, which may end the process, and once after.
        answer: dict[str, Any] = json.loads(report.read_text("utf-8"))
        return answer | {"died": f"{end}: {lines[-1]}"}
    return {"crashed": f"{end}: {lines[-1]}"}
