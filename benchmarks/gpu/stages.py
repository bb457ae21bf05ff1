"""The stages of a run: tests, rows, a whole model's steps, the sweep, rows with its tables, and a memory checker."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import replace

from gpu import rows, sweep_plan, tables
from gpu.processes import REPOSITORY, Job, run_all

TESTS = REPOSITORY / "tests" / "scattermoe_lora"
OPS = REPOSITORY / "torch-ext" / "scattermoe_lora" / "ops"
# Rows that prepare at once: the weights and buffers of all of them have to fit the card.
ROWS_AT_ONCE = 10
# Of a stage's time: for preparing, the rest is for timing.
PREPARING = 0.6
# Less than this is not worth the start of a memory checker.
LEAST_SECONDS = 30


@dataclass(frozen=True)
class Run:
    """What all stages work with.

    Attributes:
        folder: For results, whole at any time; ``work`` in it is for logs and parts.
        card: ``device``, ``dense_tflops``, ``copy_gb_per_s`` and ``table`` of the idle card.
        peers: Prepares other projects' layers: name and folder of each.
        cores: How many processes prepare at once.
        dry: Without a GPU.
    """

    folder: Path
    card: dict[str, Any]
    peers: Callable[[], dict[str, Path]]
    cores: int
    dry: bool = False

    @property
    def work(self) -> Path:
        return self.folder / "work"


def test_job(run: Run) -> Job:
    """The operators' tests, test by test over the cores."""
    sys.path.insert(0, str(TESTS))
    from gpu_tests import CHOSEN, MODULES

    device, modules, chosen = "cuda", MODULES, CHOSEN
    if run.dry:
        device, modules, chosen = "cpu", ("ops/test_grouped_linear.py",), "index_dtypes"
    command = [
        sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", str(run.cores), "--dist", "worksteal",
        "-k", chosen, *(str(TESTS / module) for module in modules),
    ]  # fmt: skip
    return Job("tests", command, {"KERNEL_TESTS_DEVICE": device})


def run_tests(run: Run, until: float) -> dict[str, Any]:
    """Run the tests; how many passed and failed, and which failed, also where they were cut off."""
    outcome = run_all([test_job(run)], run.work, until, 1)["tests"]
    return {"outcome": outcome, **read_tests((run.work / "tests.log").read_text("utf-8", "replace"))}


def read_tests(log: str) -> dict[str, Any]:
    """Counts of a test run from what it printed so far."""
    ended = re.findall(r"\[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (\S+)", log)
    counts = {
        word.lower(): sum(word == other for other, _ in ended) for word in ("PASSED", "FAILED", "SKIPPED")
    }
    failed = [name for word, name in ended if word in ("FAILED", "ERROR")]
    return {**counts, "failed": len(failed), "failures": failed}


def run_rows(run: Run, name: str, until: float, tiles: Path | None = None) -> list[dict[str, Any]]:
    """Run the rows, some at once, with the tile tables of a folder if one is given."""
    folder = run.work / name
    planned = dry_rows(tiles is not None) if run.dry else rows.planned(run.peers())
    build = built(run.work / f"{name}-kernel", tiles)
    at_once = min(run.cores, ROWS_AT_ONCE)
    for begin in range(0, len(planned), at_once):
        # Of the time that is left, as much as this part is of the rows that are left.
        now, some = time.monotonic(), planned[begin : begin + at_once]
        end = now + (until - now) * len(some) / (len(planned) - begin)
        jobs = rows.jobs(
            some, folder, build, "cpu" if run.dry else "cuda", run.card["dense_tflops"],
            now + PREPARING * (end - now),
        )  # fmt: skip
        run_all(jobs, run.work / f"{name}-logs", end, at_once)
    return rows.collect(folder)


def model_jobs(run: Run, build: Path) -> list[Job]:
    """Steps of Gemma 4 26B-A4B, named for the card that the recipe has such steps for; beside eager only the small."""
    return [
        Job(
            name,
            [
                sys.executable, "-m", "gpu.model_step", "--device", "cuda", *options,
                "--output", str(run.folder / "recipes" / f"{name}.json"),
            ],
            {"LOCAL_KERNELS": f"org/scattermoe-lora={build}"},
        )
        for name, options in (
            ("gemma4_26b_80", ["--card", "80"]), ("gemma4_26b_24", ["--card", "24", "--eager"]),
        )
    ]  # fmt: skip


def run_model(run: Run, until: float, tiles: Path | None = None) -> dict[str, Any]:
    """Run the whole model's steps, one job after the other: by job how it ended, and its figures as far as it came."""
    outcomes = run_all(model_jobs(run, built(run.work / "model-kernel", tiles)), run.work, until, 1)
    results = {}
    for name, outcome in outcomes.items():
        path = run.folder / "recipes" / f"{name}.json"
        figures = json.loads(path.read_text()) if path.exists() else {}
        results[name] = {"outcome": outcome, **figures}
    return results


def dry_rows(again: bool) -> list[rows.Row]:
    """Small rows, on the CPU."""
    layer = {"experts": 4, "hidden": 32, "intermediate": 16, "top_k": 2, "tokens": 8, "dtype": "float32"}
    experts = rows.Row("small-scattermoe", "experts", layer, "scattermoe")
    if again:
        return [experts]
    dtype = {"dtype": "float32"}
    cases = {
        "attention": {"length": 16, "head_dim": 16, **dtype},
        "loss": {"trained": "nothing", "tokens": 8, "width": 16, "words": 40, **dtype},
        "quantized": {**layer, "hidden": 64, "intermediate": 32, "format": "nf4"},
        "mlp": {"operation": "geglu", "tokens": 8, "hidden": 16, "intermediate": 32, **dtype},
        "projections": {"hidden": 512, "intermediate": 32, "tokens": 8, **dtype},
    }
    return [experts, *(rows.Row(f"{kind}-small", kind, case, "all") for kind, case in cases.items())]


def built(folder: Path, tiles: Path | None) -> Path:
    """The kernel as users load it, built with the tile tables of ``tiles`` in the place of those that ship."""
    from kernelpress.builder.build import build
    from kernelpress.source.card import read_card
    from kernelpress.spec.load import load_spec

    folder.mkdir(parents=True, exist_ok=True)
    root = REPOSITORY
    if tiles is not None:
        root = folder / "sources"
        shutil.copytree(REPOSITORY / "torch-ext", root / "torch-ext", dirs_exist_ok=True)
        for name in ("build.toml", "CARD.md", "LICENSE", *read_card(REPOSITORY)[1]):
            if (REPOSITORY / name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / name, root / name)
        shutil.copytree(tiles, root / OPS.relative_to(REPOSITORY), dirs_exist_ok=True)
    return build(load_spec(root), folder / "build").directory


def run_sweep(run: Run, until: float, name: str, timing: dict[str, Any]) -> dict[str, Any]:
    """Sweep the launches of the plan, and write the tables that follow to ``tiles`` in the run's folder.

    Their rules call the timing ``name``.

    Returns:
        The problems, each with its launches; those that there was no time for are not among them.
    """
    plan = sweep_plan.PLAN
    if run.dry:
        plan = sweep_plan.write_small_plan(run.work / "plan.json")
    now = time.monotonic()
    compile_until = now + PREPARING * (until - now)
    # A core less than there are: this process looks on.
    workers = max(run.cores - 1, 1)
    options = ["--plan", str(plan), *(["--dry"] if run.dry else [])]
    times = [str(compile_until), str(until)]
    jobs = [
        Job(
            f"sweep-{worker}",
            [sys.executable, "-m", "gpu.sweep", str(worker), str(workers), str(run.work), *times, *options],
        )
        for worker in range(workers)
    ]
    run_all(jobs, run.work, until, workers)
    problems = sweep_plan.collect(run.work, plan)
    tables.write(problems, OPS, run.card["table"], run.folder / "tiles", name, timing)
    return problems


def install(tiles: Path) -> list[Path]:
    """Put the tables of a sweep over those that ship."""
    installed = []
    for path in sorted(tiles.glob("*/tiles/*.json")):
        target = OPS / path.relative_to(tiles)
        replace(target, path.read_text())
        installed.append(target)
    return installed


def run_sanitizer(run: Run, until: float) -> dict[str, str]:
    """memcheck and racecheck on a few tests, in the time that is left."""
    tool = shutil.which("compute-sanitizer")
    if until - time.monotonic() < LEAST_SECONDS:
        return {"compute-sanitizer": "no time"}
    if tool is None:
        return {"compute-sanitizer": "is not on the PATH"}
    return run_all(sanitizer_jobs(tool), run.work, until, 2)


def sanitizer_jobs(tool: str) -> list[Job]:
    """A job for each of the memory checkers."""
    sys.path.insert(0, str(TESTS))
    from gpu_tests import CHECKED, MODULES

    modules: Sequence[str] = [str(TESTS / name) for name in MODULES if name.startswith("ops/")]
    environment = {
        "KERNEL_TESTS_DEVICE": "cuda",
        # Each tensor an allocation of its own: from torch's large ones, a neighbour's memory would do.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    return [
        Job(
            check,
            [
                tool, "--tool", check, "--error-exitcode", "1",
                # torch asks the driver for what some drivers do not have.
                "--report-api-errors", "no", "--target-processes", "application-only",
                sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CHECKED, *modules,
            ],
            environment,
        )
        for check in ("memcheck", "racecheck")
    ]  # fmt: skip


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))
