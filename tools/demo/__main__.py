"""Demonstrates the way of a kernel: built, checked, published to an embedded Hub, fetched from there, trained with.

    python tools/demo [--consumer PYTHON] [--steps N]

``PYTHON`` is an interpreter that has torch, transformers, peft and kernels, and nothing of this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernelpress.builder.build import build
from kernelpress.builder.model import Build
from kernelpress.check.variants import check
from kernelpress.errors import CheckError, KernelpressError
from kernelpress.hub.client import hub
from kernelpress.publish.publish import Published, publish
from kernelpress.spec.load import load_spec
from localhub import HubError, running_hub
from report import print_report
from rich.console import Console

REPOSITORY = Path(__file__).resolve().parents[2]
CONSUMER = Path(__file__).with_name("consumer.py")
DOCUMENTS = ("README.md", "CARD.md", "LICENSE", "docs/**/*.md")

console = Console()


class ConsumerError(KernelpressError):
    """The consumer's process failed."""


def say(step: str, text: str) -> None:
    console.print(f"[bold]{step:<8}[/] {text}", highlight=False, soft_wrap=True)


def build_and_check() -> Build:
    start = time.perf_counter()
    built = build(load_spec(REPOSITORY))
    names = ", ".join(variant.name for variant in built.variants)
    say("build", f"{names} in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    errors = [finding for finding in check(built.directory) if finding.severity == "error"]
    if errors:
        raise CheckError("the build does not hold: " + "; ".join(map(str, errors)))
    say(
        "check",
        f"{len(built.variants)} variants load in clean processes, {time.perf_counter() - start:.1f} s",
    )
    return built


def english_text() -> bytes:
    """The repository's own documents: real text that every clone has."""
    paths = [path for pattern in DOCUMENTS for path in sorted(REPOSITORY.glob(pattern))]
    return b"\n".join(path.read_bytes() for path in paths)


def consume(python: Path, endpoint: str, repo_id: str, version: int, steps: int) -> dict[str, Any]:
    """Run the consumer in an empty directory with an empty cache; returns its events."""
    with tempfile.TemporaryDirectory() as scratch:
        script, text = Path(scratch, CONSUMER.name), Path(scratch, "text")
        script.write_bytes(CONSUMER.read_bytes())
        text.write_bytes(english_text())
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON", "LOCAL_KERNELS"))
        }
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": f"{scratch}/cache"}
        command = [str(python), "-I", str(script), repo_id, str(version), str(text), str(steps)]
        events: dict[str, Any] = {}
        with (
            open(Path(scratch, "errors"), "w+") as errors,
            subprocess.Popen(
                command, cwd=scratch, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                events[event.pop("event")] = event
                show_progress(event)
            if process.wait() != 0:
                errors.seek(0)
                raise ConsumerError(
                    f"the consumer ended with exit code {process.returncode}:\n{errors.read()[-3000:]}"
                )
    return events


def show_progress(event: dict[str, Any]) -> None:
    if "step" in event and (event["step"] % 10 == 0 or event["step"] == 1):
        say(
            "train",
            f"{event['implementation']:<10} step {event['step']:>2}/{event['steps']}  loss {event['loss']:.4f}",
        )
    elif "file" in event:
        say("fetch", f"{event['id']} loaded from {event['file']}")


def summarize(built: Build, published: Published, endpoint: str, events: dict[str, Any]) -> dict[str, Any]:
    runs = events["result"]["runs"]
    baseline = runs["grouped_mm"]
    for run in runs.values():
        pairs = zip(run["losses"], baseline["losses"], strict=False)  # the control runs fewer steps
        run["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
        run["speedup"] = baseline["ms_per_step"] / run["ms_per_step"]
        run["memory_ratio"] = run["peak_memory_bytes"] / baseline["peak_memory_bytes"]
    return {
        "variants": {variant.name: variant.id for variant in built.variants},
        "tree_hash": built.tree_hash,
        "endpoint": endpoint,
        "repo_id": published.repo_id,
        "branches": [asdict(branch) for branch in published.branches],
        "consumer": events["loaded"],
        "runs": runs,
    }


def run(python: Path, steps: int) -> None:
    start = time.perf_counter()
    if not python.is_file():
        raise ConsumerError(f"there is no interpreter {python} for the consumer; `make setup` makes one")
    say("demo", "publishes to an embedded Hub on this machine; nothing is sent to huggingface.co")
    built = build_and_check()
    organization = (built.spec.repo_id or "").split("/")[0]
    with running_hub(REPOSITORY / ".hub", trust=[organization]) as server:
        say("serve", f"embedded Hub at {server.endpoint}, root .hub")
        published = publish(built, None, hub(server.endpoint))
        for branch in published.branches:
            change = f"{branch.added} files" if branch.changed else "unchanged"
            say("publish", f"{published.repo_id}@{branch.name}: {change}, commit {branch.commit[:12]}")
        events = consume(python, server.endpoint, published.repo_id, built.spec.version, steps)
    summary = summarize(built, published, server.endpoint, events)
    report = built.directory / "publish-report.json"
    report.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print_report(console, summary)
    say("done", f"{time.perf_counter() - start:.0f} s; the same in {report.relative_to(REPOSITORY)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--consumer", type=Path, default=REPOSITORY / ".venv-consumer/bin/python", metavar="PYTHON"
    )
    parser.add_argument("--steps", type=int, default=30, metavar="N")
    arguments = parser.parse_args()
    try:
        run(arguments.consumer.absolute(), arguments.steps)
    except (KernelpressError, HubError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
