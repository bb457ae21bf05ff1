"""The clean process that loads kernels: torch, the loader and the standard library, and nothing of this project's.

Run as a script. It imports torch and the loader once and then splits off a process for each variant, so that each
finds them as after its own import, and none waits for it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_TIMEOUT = 300.0
# A process that loads a kernel and what it imports of torch may need 500 MB.
_PARALLEL = 2


def main(listed: Path) -> None:
    """Do the jobs of a list, two at a time, and write their answers beside it."""
    import kernels  # type: ignore[import-untyped]  # noqa: F401
    import torch  # noqa: F401

    todo = [job | {"do": "load"} for job in json.loads(listed.read_text("utf-8"))]
    number_of_jobs = len(todo)
    modules: dict[str, int] = {}
    alone: dict[int, int] = {}

    def follow(number: int, answer: dict[str, Any]) -> None:
        job = todo[number]
        if job["do"] != "load" or "crashed" in answer:
            return
        if answer["effects"] or any(op.partition("::")[0] != job["id"] for op in answer["ops"]):
            # The variants of a kernel import the same modules, as a rule.
            key = "\n".join(answer["modules"])
            if key not in modules:
                modules[key] = len(todo)
                todo.append(job | {"do": "modules", "modules": answer["modules"]})
        if answer["error"] is None and answer["triton"] and job["cpu"]:
            alone[number] = len(todo)
            todo.append(job | {"do": "load without triton"})

    done = _all(todo, follow)
    for number, answer in enumerate(done[:number_of_jobs]):
        if "crashed" in answer:
            continue
        without = done[alone[number]] if number in alone else {"error": None}
        answer["without_triton"] = without.get("crashed") or without["error"]
        brought = modules.get("\n".join(answer["modules"]))
        alike = {} if brought is None else done[brought]
        answer["brought_along"] = alike.get("ops", [])
        # What the modules do that a kernel imports is not for its author to mend.
        answer["effects"] = [each for each in answer["effects"] if each not in alike.get("effects", [])]
    _beside("loading").write(listed.with_name("answers.json"), done[:number_of_jobs])


def _all(todo: list[dict[str, Any]], follow: Callable[[int, dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Do jobs, each in a process of its own; ``follow`` may add some when one is done."""
    answers: list[dict[str, Any]] = []
    running: dict[int, tuple[_Process, float]] = {}
    while len(answers) < len(todo) or running:
        while len(answers) < len(todo) and len(running) < _PARALLEL:
            job = todo[len(answers)]
            process = _Process(Path(job["folder"], job["do"]), job)
            running[len(answers)] = process, time.monotonic() + _TIMEOUT
            answers.append({})
        for number, (process, end) in list(running.items()):
            over = time.monotonic() > end
            status = process.stop() if over else process.poll()
            if status is None:
                continue
            answers[number] = _answer(process.folder, f"not done after {_TIMEOUT:.0f} s" if over else status)
            del running[number]
            follow(number, answers[number])
        time.sleep(0.01)
    return answers


class _Process:
    """One job in a process: a copy of this one where the system can make one, or else another Python."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.popen: subprocess.Popen[bytes] | None = None
        if hasattr(os, "fork"):
            self.pid = os.fork()
            if not self.pid:
                _child(folder, job)
        else:  # on Windows
            _beside("loading").write(folder / "job.json", job)
            with (folder / "said").open("wb") as said:
                self.popen = subprocess.Popen(
                    [sys.executable, "-I", "-B", __file__, "--job", str(folder)], cwd=folder, stderr=said
                )

    def poll(self) -> str | None:
        """How the process ended; ``None`` if it has not."""
        if self.popen is not None:
            code = self.popen.poll()
        else:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else None
        return None if code is None else f"the process ended with status {code}"

    def stop(self) -> str:
        """End the process."""
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait()
        else:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        return "stopped"


def _child(folder: Path, job: dict[str, Any]) -> None:
    code = 1
    try:
        os.chdir(folder)
        with (folder / "said").open("wb") as said:
            os.dup2(said.fileno(), 2)
        _beside("loading").do(folder / "report.json", job)
        code = 0
    except BaseException:  # noqa: BLE001 - nothing may escape into the copied stack of the other process
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _answer(folder: Path, end: str) -> dict[str, Any]:
    report = folder / "report.json"
    said = (folder / "said").read_text("utf-8", "replace").strip().splitlines()
    end += f": {said[-1] if said else 'no message'}"
    if report.is_file():
        # It is written once before the operators are called, which may end the process, and once after.
        answer: dict[str, Any] = json.loads(report.read_text("utf-8"))
        return answer | {"died": end}
    return {"crashed": end}


def _beside(name: str) -> ModuleType:
    """A module beside this one, in a package that no kernel finds by accident."""
    package = ModuleType("_kernelpress_inside")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.{name}")


if __name__ == "__main__":
    if sys.argv[1] == "--job":
        _beside("loading").do(
            Path(sys.argv[2], "report.json"), json.loads(Path(sys.argv[2], "job.json").read_text("utf-8"))
        )
    else:
        main(Path(sys.argv[1]))
