"""The demonstration, as ``make publish`` runs it, on a copy of the repository."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
CONSUMER = REPOSITORY / ".venv-consumer/bin/python"
NEEDED = ("build.toml", "CARD.md", "LICENSE", "README.md", "torch-ext", "tools/demo", "benchmarks/results")


def copy_of_the_repository(target: Path) -> Path:
    for name in NEEDED:
        source, copy = REPOSITORY / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    return target


def run_demo(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "tools/demo"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)


def write_consumer(path: Path, report: dict[str, Any]) -> Path:
    """An interpreter for consumers that trains nothing: it says what one has said by a report."""
    events = [{"event": "loaded", **report["consumer"]}, {"event": "result", "runs": report["runs"]}]
    lines = "\n".join(map(json.dumps, events))
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
    path.chmod(0o755)
    return path


def test_the_demonstration_publishes_and_trains_and_a_second_run_commits_nothing(tmp_path: Path) -> None:
    repository = copy_of_the_repository(tmp_path)
    done = run_demo(repository, "--consumer", str(CONSUMER), "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "embedded Hub" in done.stdout.splitlines()[0]
    report = json.loads((repository / "build/publish-report.json").read_text())

    assert set(report["variants"]) == {
        "torch-cpu", "torch-cuda", "torch-rocm", "torch-universal", "torch-xpu"
    }  # fmt: skip
    assert {branch["name"] for branch in report["branches"]} == {"v1", "main"}
    published = {branch["name"]: branch["commit"] for branch in report["branches"]}
    assert report["consumer"]["revision"] == published["v1"]
    assert report["consumer"]["id"] == report["variants"]["torch-cpu"]
    assert f"snapshots/{published['v1']}/build/torch-cpu" in report["consumer"]["file"]
    ours, theirs = report["runs"]["scattermoe"], report["runs"]["grouped_mm"]
    assert abs(ours["losses"][0] - theirs["losses"][0]) < 1e-5
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["peak_memory_bytes"] < theirs["peak_memory_bytes"]

    consumer = write_consumer(tmp_path / "consumer", report)
    again = run_demo(repository, "--consumer", str(consumer))
    assert again.returncode == 0, again.stdout + again.stderr
    branches = json.loads((repository / "build/publish-report.json").read_text())["branches"]
    assert {branch["name"]: branch["commit"] for branch in branches} == published
    assert not any(branch["changed"] for branch in branches)


def test_a_consumer_that_fails_is_one_message_and_exit_code_1(tmp_path: Path) -> None:
    repository = copy_of_the_repository(tmp_path)
    done = run_demo(repository, "--consumer", str(repository / "no-such-python"), "--steps", "3")
    assert done.returncode == 1
    assert "error: " in done.stdout
    assert "no-such-python" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
