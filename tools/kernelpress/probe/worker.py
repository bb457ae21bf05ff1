"""The worker process that loads kernels: it has torch, the loader and the standard library, and none of the project.

It imports torch and the loader once and then splits off a process for each variant, so that each finds them as after
its own import, and none waits for it. Operators are called last, in processes that have what torch imports for fake
tensors too, which takes longer than most calls, and is nothing that a kernel should find when it is examined.
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

from . import loading, op_calls
from .collector import imports_kept

_TIMEOUT = 300.0
# A process that loads a kernel and what it imports of torch may need 500 MB.
_PARALLEL = 2


def main(jobs_file: str, report: str = "") -> None:
    """Do the jobs of a list, two at a time, and report on each.

    Args:
        jobs_file: JSON, a list of jobs.
        report: The file to write; without it, ``jobs_file`` holds the single job of a process that is started anew.
    """
    with imports_kept():
        import kernels  # type: ignore[import-untyped]  # noqa: F401
        import torch  # noqa: F401

    jobs = json.loads(Path(jobs_file).read_text("utf-8"))
    if not report:
        loading.run_job(jobs)
        return
    answers = _run_all(jobs)
    loaded = [pair for pair in zip(jobs, answers, strict=True) if "crashed" not in pair[1]]
    more: dict[str, dict[str, Any]] = {}
    for job, answer in loaded:
        if answer["effects"] or any(op.partition("::")[0] != job["id"] for op in answer["ops"]):
            # The variants of a kernel import the same modules, as a rule.
            more["\n".join(answer["modules"])] = job | {
                "kind": "import modules",
                "modules": answer["modules"],
            }
        if answer["error"] is None and answer["triton"] and job["cpu"]:
            more[job["folder"]] = job | {"kind": "load without triton"}
    results = dict(zip(more, _run_all(list(more.values())), strict=True))
    for job, answer in loaded:
        without_triton = results.get(job["folder"], {"error": None})
        answer["without_triton"] = without_triton.get("crashed") or without_triton["error"]
        # What the modules do that a kernel imports is not for its author to mend.
        imports = results.get("\n".join(answer["modules"]), {})
        answer["ops"] = [op for op in answer["ops"] if op not in imports.get("ops", ())]
        others = {effect for effect, *_ in imports.get("effects", ())}
        answer["effects"] = [entry for entry in answer["effects"] if entry[0] not in others]
    _locate_effects(loaded)
    _call_operators(loaded)
    loading.write(Path(report), answers)


def _locate_effects(loaded: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Fill in the files and lines of side effects that only loading the kernel statement by statement shows."""
    unplaced = [
        (job | {"kind": "locate effects"}, answer)
        for job, answer in loaded
        if any(file is None for _, file, _ in answer["effects"])
    ]
    results = _run_all([job for job, _ in unplaced])
    for (_, answer), result in zip(unplaced, results, strict=True):
        places = {effect: place for effect, *place in result.get("effects", ())}
        answer["effects"] = [
            entry if entry[1] is not None else [entry[0], *places.get(entry[0], (None, None))]
            for entry in answer["effects"]
        ]


def _call_operators(loaded: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Fill in what calling the operators shows, of each variant that loads and whose job asks for it."""
    called = [
        (job | {"kind": "call operators"}, answer)
        for job, answer in loaded
        if job["call"] and answer["error"] is None
    ]
    if called:
        with imports_kept():
            op_calls.prepare()
    results = _run_all([job | {"twin_loads": answer["twin_error"] is None} for job, answer in called])
    for (_, answer), result in zip(called, results, strict=True):
        answer |= {"calls": None, "died": result["crashed"]} if "crashed" in result else result


def _run_all(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do jobs, each in a process of its own, and return their answers in the order of the jobs."""
    answers: dict[int, dict[str, Any]] = {}
    waiting = list(enumerate(jobs))
    running: dict[int, tuple[Any, Callable[[], int | None], float]] = {}
    while waiting or running:
        while waiting and len(running) < _PARALLEL:
            number, job = waiting.pop(0)
            running[number] = *_start(job), time.monotonic() + _TIMEOUT
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
        time.sleep(0.01)
    return [answers[number] for number in range(len(jobs))]


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
        report_of_job: dict[str, Any] = json.loads(report.read_text("utf-8"))
        return report_of_job
    return {"crashed": f"{end}: {lines[-1]}"}
