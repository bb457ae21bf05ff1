"""Runs a recipe with the kernel and in eager mode, compares the two, and writes what was measured as JSON.

    python recipes/measure.py laptop                        # any recipe's name, with the recipe's own options
    python recipes/measure.py gemma4_26b_qlora --card 80 --steps 20 --no-eager --planned 19327352832

Each runs in a process of its own; `python benchmarks/results_page.py` then shows the file in docs/results.md. Time is
the median between optimizer steps. Memory is the peak above what the process held once its libraries were imported: by
CUDA's allocator, or without a GPU by Linux's count of the process's pages.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import itertools
import json
import platform
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent
RESULTS = RECIPES.parent / "benchmarks/results/recipes"
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "kernels")
WARM_UP_STEPS = 2


def run(recipe: str, arguments: list[str], result: str) -> None:
    """One run in this process: losses, milliseconds a step and peak memory, as JSON in the file ``result``."""
    import torch
    import transformers.trainer  # noqa: F401
    from torch.optim.optimizer import register_optimizer_step_post_hook

    with contextlib.suppress(ImportError):  # Not every recipe needs it.
        import peft  # noqa: F401
    moments: list[float] = []

    def note(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        moments.append(time.perf_counter())

    hook = register_optimizer_step_post_hook(note)
    start = _memory("VmRSS")
    sys.argv = [recipe, *arguments]
    sys.path.insert(0, str(RECIPES))
    state = runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
    hook.remove()
    steps = [after - before for before, after in itertools.pairwise(moments)]
    history = state["trainer"].state.log_history if "trainer" in state else []
    losses = state.get("losses") or [row["loss"] for row in history if "loss" in row]
    if not steps or not losses:
        sys.exit(
            f"measure: {recipe} has neither losses nor a trainer that logged them after two steps or more"
        )
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _memory("VmHWM") - start
    measured = {
        "losses": losses,
        "ms_per_step": 1000 * statistics.median(steps[WARM_UP_STEPS:] or steps),
        "peak_bytes": peak,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
    }
    Path(result).write_text(json.dumps(measured))


def _memory(field: str) -> int:
    """A line of Linux's account of this process, in bytes; the highest use is counted from the call for ``VmRSS``."""
    if field == "VmRSS":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    import torch

    return f"{model or platform.processor()}, {torch.get_num_threads()} threads"


def measure(recipe: str, arguments: list[str], eager: bool, planned: int | None) -> dict[str, Any]:
    """Both runs, and all that says what they are of."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("ours", "eager")[: 1 + eager]:
            print(f"{recipe}, {name}:", flush=True)
            options = [*arguments, "--output", f"{scratch}/{name}", *(["--eager"] if name == "eager" else [])]
            command = [sys.executable, __file__, "--run", recipe, f"{scratch}/{name}.json", *options]
            subprocess.run(command, check=True)
            rows[name] = json.loads(Path(f"{scratch}/{name}.json").read_text())
    commit = subprocess.run(
        ["git", "-C", str(RECIPES), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    fields = ("losses", "ms_per_step", "peak_bytes")
    return {
        "recipe": recipe,
        "device": rows["ours"]["device"],
        "versions": versions | {"python": platform.python_version()},
        "commit": commit.stdout.strip() or None,
        "date": date.today().isoformat(),
        "command": " ".join(["python recipes/measure.py", recipe, *arguments]),
        **{field: {name: row[field] for name, row in rows.items()} for field in fields},
        "planned_bytes": planned,
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['recipe']} on {result['device']}")
    print(f"{'':<8}{'first loss':>12}{'last loss':>12}{'ms a step':>12}{'peak MiB':>12}")
    for name, losses in result["losses"].items():
        milliseconds, peak = result["ms_per_step"][name], result["peak_bytes"][name] / 2**20
        print(f"{name:<8}{losses[0]:>12.4f}{losses[-1]:>12.4f}{milliseconds:>12.0f}{peak:>12.0f}")


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        run(sys.argv[2], sys.argv[4:], sys.argv[3])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", choices=sorted(path.stem for path in RECIPES.glob("*.py")), metavar="RECIPE"
    )
    parser.add_argument("--no-eager", action="store_true", help="with the kernel alone")
    parser.add_argument("--planned", type=int, help="peak in bytes that recipes/plan.py foresees")
    parser.add_argument("--warning", help="what readers of the figures must know, shown beside them")
    parser.add_argument("--json", type=Path, help="file to write; benchmarks/results/recipes/RECIPE.json")
    options, arguments = parser.parse_known_args()
    try:
        result = measure(options.recipe, arguments, not options.no_eager, options.planned)
    except subprocess.CalledProcessError as error:
        sys.exit(f"measure: {options.recipe} ended with exit status {error.returncode}; nothing was written")
    if options.warning:
        result["warning"] = options.warning
    path = options.json or RESULTS / f"{options.recipe}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
