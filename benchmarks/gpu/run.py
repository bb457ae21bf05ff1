"""Everything that needs a GPU, in a few minutes: tests, comparisons, a sweep of launches, and a report.

    make gpu    or    python benchmarks/gpu [--minutes 8] [--wheels wheels] [--install]

takes any Python that has torch for the GPU and the packages in NEEDED. The minutes are divided over the stages; what a
stage has done by its end is kept, and the next one begins. Results go to ``benchmarks/results/<device>/<date>/``, each
as it comes. The exit status is 0 if no test failed and no row of ours.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measuring import REPOSITORY, provenance

from gpu import report, stages
from gpu.budget import Budget
from gpu.processes import end_children_when_ended
from gpu.rows import is_failure

RESULTS = REPOSITORY / "benchmarks" / "results"
# The kernel's own and its tests', and what kernelpress builds it with.
NEEDED = (
    "torch", "triton", "transformers", "peft", "kernels", "pytest", "xdist", "hypothesis", "httpx2", "dulwich", "tomli",
    "ruff",
)  # fmt: skip
# What kernelpress builds a kernel with that comes in a wheel.
PEERS_NEED = ("tomlkit",)
# In order. What one leaves over serves those after it, and what all leave over the memory checker.
SHARES = {"tests": 0.2, "rows": 0.24, "sweep": 0.22, "rows again": 0.12, "model": 0.2, "sanitizer": 0.02}
MEASURE_CARD = """
import json, torch
from compare_attention import dense_rate
from measuring import median_seconds
from scattermoe_lora.ops.tile_tables import table_of
if torch.cuda.is_available():
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    seconds, _ = median_seconds(lambda: b.copy_(a), torch.cuda.synchronize, repeats=15)
    rates = {"dense_tflops": dense_rate("bfloat16", "cuda") / 1e12, "copy_gb_per_s": 2 * 2**30 / seconds / 1e9}
    table = table_of(torch.device("cuda", torch.cuda.current_device()))
    print(json.dumps({"device": torch.cuda.get_device_name(), **rates, "table": table}))
"""
MADE_UP = {"device": "made-up GPU", "dense_tflops": 785.0, "copy_gb_per_s": 3001.0, "table": "sm_90"}


def measured_card(needed: Sequence[str]) -> dict[str, Any]:
    """The idle card's name, rates and tile table; ends with one line where there is none, or a package is missing."""
    if missing := [name for name in needed if find_spec(name) is None]:
        sys.exit(f"error: {sys.executable} lacks {', '.join(missing)}: pip install {' '.join(missing)}")
    # In a process of its own: this one is to leave the GPU to the others.
    path = (
        f"import sys; sys.path[:0] = {[str(REPOSITORY / name) for name in ('benchmarks', 'torch-ext')]!r}\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", path + MEASURE_CARD], capture_output=True, text=True, check=False
    )
    if not process.stdout.strip():
        output = (process.stderr.strip().splitlines() or ["torch finds none"])[-1]
        sys.exit(f"error: no GPU for {sys.executable}: {output}")
    card: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return card


def name_of(device: str, date: str) -> str:
    """The name of a run: its folder in the results, and what rules of tile tables call its timing."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-")
    return f"{slug}/{date[:16].replace(':', '')}"


class Recorder:
    """Runs stages and keeps what they found in the report, also of a stage that an interrupt ends."""

    def __init__(self, folder: Path, results: dict[str, Any], budget: Budget) -> None:
        self.folder, self.results, self.budget = folder, results, budget

    def stage(self, name: str, key: str, run: Callable[[float], Any]) -> None:
        """Run a stage that is to run until its time is over, and write the report with its results."""
        if name not in self.budget.shares:
            return
        begin, until = time.monotonic(), self.budget.until(name)
        print(f"{name}: at most {until - begin:.0f} s", flush=True)
        stage = self.results["stages"][name] = {"seconds": 0.0, "outcome": "interrupted"}
        try:
            self.results[key] = run(until)
            stage["outcome"] = "done" if time.monotonic() < until else "cut off"
        finally:
            stage["seconds"] = time.monotonic() - begin
            report.write(self.folder, self.results)
            print(f"{name}: {stage['outcome']}, {stage['seconds']:.0f} s", flush=True)


def run_all(run: stages.Run, results: dict[str, Any], budget: Budget, install: bool) -> int:
    """Run all stages; the exit status."""
    recorder = Recorder(run.folder, results, budget)
    versions = {name: results["versions"][name] for name in ("torch", "triton")}
    timing = {
        "device": results["device"], "date": results["date"][:10], **versions, "commit": results["commit"],
        "figures": str(run.folder / "sweep.json").removeprefix(f"{REPOSITORY}/"),
    }  # fmt: skip
    name, tiles = name_of(results["device"], results["date"]), run.folder / "tiles"
    recorder.stage("tests", "tests", lambda until: stages.run_tests(run, until))
    recorder.stage("rows", "rows", lambda until: stages.run_rows(run, "rows", until))
    recorder.stage("sweep", "sweep", lambda until: stages.run_sweep(run, until, name, timing))
    if install:
        for path in stages.install(tiles):
            print(f"installed {path}", flush=True)
    if tiles.is_dir():
        again = "rows_with_new_tables"
        recorder.stage("rows again", again, lambda until: stages.run_rows(run, again, until, tiles))
    new = tiles if tiles.is_dir() else None
    recorder.stage("model", "model", lambda until: stages.run_model(run, until, new))
    recorder.stage("sanitizer", "sanitizer", lambda until: stages.run_sanitizer(run, until))
    print(f"report: {run.folder / 'report.md'}", flush=True)
    tests = results.get("tests", {"failed": 0, "outcome": ""})
    failed = bool(tests["failed"]) or tests["outcome"].startswith("exit status")
    rows = [*results.get("rows", ()), *results.get("rows_with_new_tables", ())]
    return int(failed or any(is_failure(row) for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages together; default 8")
    parser.add_argument("--stages", default=",".join(SHARES), help="some of them; default %(default)s")
    parser.add_argument("--wheels", type=Path, help="the folder with axolotl's and Unsloth's wheels")
    parser.add_argument("--install", action="store_true", help="put the sweep's tables over those that ship")
    parser.add_argument("--output", type=Path, help="the folder for results")
    parser.add_argument(
        "--dry", action="store_true", help="small, without a GPU: it compiles, and times are made up"
    )
    given = parser.parse_args()
    if given.wheels and not given.wheels.is_dir():
        parser.error(f"--wheels: {given.wheels} is no folder")
    if given.dry and (given.install or not given.output):
        parser.error("--dry: needs --output, and times that are made up are not installed")
    # Without a GPU there are neither steps of a whole model nor a memory checker.
    names = set(given.stages.split(",")) - ({"model", "sanitizer"} if given.dry else set())
    if unknown := names - set(SHARES):
        parser.error(f"--stages: {', '.join(sorted(unknown))}: none of {', '.join(SHARES)}")
    budget = Budget(given.minutes, {name: share for name, share in SHARES.items() if name in names})
    card = MADE_UP if given.dry else measured_card([*NEEDED, *(PEERS_NEED if given.wheels else [])])
    results: dict[str, Any] = {
        **provenance(), "device": card["device"], "card": card, "minutes": given.minutes, "stages": {},
    }  # fmt: skip
    folder = (given.output or RESULTS / name_of(card["device"], results["date"])).resolve()
    folder.joinpath("work").mkdir(parents=True, exist_ok=True)
    end_children_when_ended()
    with TemporaryDirectory() as scratch:

        def peers() -> dict[str, Path]:
            from compare import IMPLEMENTATIONS, prepare_peers

            return prepare_peers(IMPLEMENTATIONS, given.wheels, Path(scratch))

        run = stages.Run(folder, card, peers, stages.cores(), given.dry)
        sys.exit(run_all(run, results, budget, given.install))
