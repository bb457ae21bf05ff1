"""Trains by a recipe with the kernel and with transformers' own code, and notes losses, time and memory.

    python benchmarks/compare_recipe.py recipes/NAME.py --output benchmarks/results/recipes/NAME.json -- --tiny

What stands behind -- goes to the recipe, once as it is and once with --eager behind it. ``--python`` has what the
recipe imports. ``python benchmarks/results_page.py`` shows the file in docs/results.md. Its keys:

- ``recipe``, ``command``, ``device``, and ``date``, ``commit`` and ``versions`` as in every file of results;
- ``losses``: ``{"ours": [...], "eager": [...]}``, of each step;
- ``ms_per_step``: ``{"ours": ..., "eager": ...}``, the median without the first step;
- ``peak_bytes``: likewise; on a GPU what was allocated, on a CPU above the process with its libraries imported;
- ``planned_bytes``: what a plan says that ``ours`` takes, or null;
- ``warning``: what a reader must know of them, if anything.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from measuring import REPOSITORY, device_name, peak_memory, start_memory, write


def train(recipe: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a recipe in this process, and return its losses, median milliseconds of a step and peak bytes.

    Raises:
        SystemExit: It trained nothing with a ``Trainer``.
    """
    import torch
    import transformers
    from transformers import trainer

    for name in ("peft", "trl", "datasets", "bitsandbytes"):
        with suppress(ImportError):
            importlib.import_module(name)
    losses: list[float] = []
    seconds: list[float] = []

    class Notes(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.perf_counter()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer.DEFAULT_CALLBACKS.append(Notes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = start_memory(device)
    sys.argv = [str(recipe), *arguments]
    sys.path.insert(0, str(recipe.parent))
    runpy.run_path(str(recipe), run_name="__main__")
    if len(seconds) < 2 or not losses:
        sys.exit(f"{recipe}: trained less than two steps with a Trainer that logs its loss")
    return {
        "device": device_name(device),
        "losses": losses,
        "ms_per_step": 1000 * statistics.median(seconds[1:]),
        "peak_bytes": peak_memory(device) - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="its script")
    parser.add_argument("--python", default=str(REPOSITORY / ".venv-consumer/bin/python"))
    parser.add_argument("--planned", type=int, help="the bytes that a plan says")
    parser.add_argument("--warning", help="what readers of the figures must know, shown beside them")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, own = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if options.child:
        print(json.dumps(train(options.recipe, own)))
        return
    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec

    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        kernel = build(load_spec(REPOSITORY), Path(scratch, "build")).directory
        environment = {**os.environ, "LOCAL_KERNELS": f"org/scattermoe-lora={kernel}"}
        for name, more in (("ours", []), ("eager", ["--eager"])):
            command = [options.python, __file__, "--child", str(options.recipe.resolve())]
            process = subprocess.run(
                [*command, "--", *own, *more],
                cwd=scratch,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if process.returncode:
                sys.exit(f"error: {options.recipe} ({name}) ended with exit code {process.returncode}")
            rows[name] = row = json.loads(process.stdout.splitlines()[-1])
            print(
                f"{name}: loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}, {row['ms_per_step']:.0f} ms a step, "
                f"{row['peak_bytes'] / 1e6:.0f} MB",
                flush=True,
            )
    figures: dict[str, Any] = {
        "recipe": options.recipe.stem,
        "command": f"python benchmarks/compare_recipe.py recipes/{options.recipe.name} -- {shlex.join(own)}",
        "device": rows["ours"]["device"],
    }
    if options.warning:
        figures["warning"] = options.warning
    for key in ("losses", "ms_per_step", "peak_bytes"):
        figures[key] = {name: row[key] for name, row in rows.items()}
    write(options.output, figures | {"planned_bytes": options.planned})


if __name__ == "__main__":
    main()
