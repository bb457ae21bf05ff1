"""Everything that needs a GPU, one step after another: the tests, the comparisons, the memory checkers.

    make gpu    or    python benchmarks/gpu.py [--minutes 60] [--wheels wheels]

takes any Python that has torch for the GPU and the packages in NEEDED. Each step is a process of its own, whose log and
figures go to ``benchmarks/results/<device>/``. One that fails, or takes longer than it may, does not stop the others;
what ``--minutes`` leaves no time for is skipped. The exit status is 0 if no step failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

REPOSITORY = Path(__file__).resolve().parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
# The kernel's own and its tests', and what kernelpress builds it with.
NEEDED = (
    "torch", "triton", "transformers", "peft", "kernels", "pytest", "hypothesis", "httpx2", "dulwich", "tomli",
)  # fmt: skip
# What kernelpress builds a kernel with that comes in a wheel.
PEERS_NEED = ("tomlkit",)
PROBE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
# Operators on small, awkward shapes: under a memory checker each launch takes many times longer.
CHECKED = [
    f"tests/scattermoe_lora/ops/test_{name}.py"
    for name in ("grouped_linear", "experts", "norm_rotary", "attention")
]
SELECTED = "gradients_match_the_reference"
# Less than this is not worth a start.
LEAST_MINUTES = 0.5
# After being asked to end.
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Step:
    """A command, and how long it may take; ``{minutes}`` in it is the time that it has for itself to end.

    ``after`` names a step that has to pass first, ``missing`` says why the step cannot run here.
    """

    name: str
    command: Sequence[str]
    minutes: float
    environment: Mapping[str, str] = field(default_factory=dict)
    after: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step: ``passed``, ``failed`` or ``skipped``, and more words on it."""

    name: str
    word: str
    detail: str


def steps(folder: Path, wheels: Path | None) -> list[Step]:
    """All there is to do, in order of what is wanted most."""

    def script(name: str, *options: str) -> list[str]:
        return [sys.executable, str(BENCHMARKS / name), *options]

    def compare(figures: str) -> list[str]:
        peers = ["--wheels", str(wheels)] if wheels else []
        return script("compare.py", "--device", "cuda", "--output", str(folder / figures), *peers)

    def pytest(*options: str) -> list[str]:
        return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]

    # Each is a process that compiles for minutes on one core.
    parallel = ["-n", "5", "--dist", "worksteal"] if find_spec("xdist") else []
    sanitizer = shutil.which("compute-sanitizer")
    on_gpu = {
        "KERNEL_TESTS_DEVICE": "cuda",
        # Each tensor an allocation of its own: from torch's large ones, a neighbour's memory would do.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    attention, norms = folder / "attention.json", folder / "norm_rotary.json"
    return [
        Step("tests", pytest("-v", "-m", "gpu", *parallel, "tests/scattermoe_lora"), 15),
        Step("compare", compare("compare.json"), 10),
        Step("attention", script("compare_attention.py", "--device", "cuda", "--output", str(attention)), 12),
        Step("norm_rotary", script("benchmark_norm_rotary.py", "--device", "cuda", "--output", str(norms)), 4),
        *(
            Step(
                tool,
                [
                    sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1",
                    # torch asks the driver for what some drivers do not have.
                    "--report-api-errors", "no", "--target-processes", "application-only",
                    *pytest("-q", "-k", SELECTED, *CHECKED),
                ],
                8,
                environment=on_gpu,
                missing="" if sanitizer else "compute-sanitizer is not on the PATH",
            )
            for tool in ("memcheck", "racecheck")
        ),
    ]  # fmt: skip


def run(step: Step, log: Path, minutes: float) -> int | None:
    """Runs a step with its output in ``log``; its exit status, or None where it took longer than ``minutes``."""
    # A minute to end by itself, or what it can be given of one.
    own = max(minutes - 1, minutes / 2)
    command = [argument.replace("{minutes}", f"{own:.1f}") for argument in step.command]
    paths = [str(REPOSITORY / "tools"), str(REPOSITORY / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    # A process that is killed leaves what it put into a temporary folder; this one goes with the step.
    with TemporaryDirectory(prefix=f"{step.name}-") as scratch, log.open("wb") as output:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": scratch,
            **step.environment,
        }
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        # Its own group, so that the processes that it starts end with it.
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a process and of those that it started: asks first, and waits a while."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(GRACE_SECONDS)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:
        # Also where an interrupt ends the waiting, and where the process has left others behind.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_steps_when_ended() -> None:
    """Lets the signals that end this process end the step that runs, as an interrupt does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


def run_all(todo: Sequence[Step], folder: Path, minutes: float) -> Iterator[Outcome]:
    """Runs the steps in turn and says what became of each."""
    deadline = time.monotonic() + 60 * minutes
    passed = set()
    for step in todo:
        minutes_left = (deadline - time.monotonic()) / 60
        limit = min(step.minutes, minutes_left)
        log = folder / f"{step.name}.log"
        if step.missing:
            yield Outcome(step.name, "skipped", step.missing)
        elif step.after and step.after not in passed:
            yield Outcome(step.name, "skipped", f"{step.after} did not pass")
        elif limit < min(LEAST_MINUTES, step.minutes):
            yield Outcome(step.name, "skipped", f"the {minutes:g} minutes are spent")
        else:
            print(f"{step.name}: at most {limit:.1f} minutes, {log}", flush=True)
            begin = time.monotonic()
            status = run(step, log, limit)
            took = f"{time.monotonic() - begin:.0f} s"
            if status == 0:
                passed.add(step.name)
                yield Outcome(step.name, "passed", took)
            elif status is None:
                yield Outcome(step.name, "failed", f"not done after {took}")
            else:
                yield Outcome(step.name, "failed", f"exit status {status} after {took}")


def report(outcomes: Iterator[Outcome], folder: Path) -> int:
    """Prints each outcome as it comes, what a failed step said last, and a summary; the exit status."""
    told = []
    for outcome in outcomes:
        told.append(outcome)
        print(f"{outcome.name}: {outcome.word}, {outcome.detail}", flush=True)
        if outcome.word == "failed":
            output = (folder / f"{outcome.name}.log").read_text("utf-8", "replace").splitlines()
            print("\n".join(f"    {line}" for line in output[-20:]), flush=True)
    print(f"\n{'step':<16}{'':<10}")
    for outcome in told:
        print(f"{outcome.name:<16}{outcome.word:<10}{outcome.detail}")
    print(f"logs and figures: {folder}", flush=True)
    return int(any(outcome.word == "failed" for outcome in told))


def gpu_name(needed: Sequence[str]) -> str:
    """The GPU's name; ends with one line where there is none, or a package is missing."""
    if missing := [name for name in needed if find_spec(name) is None]:
        sys.exit(f"error: {sys.executable} lacks {', '.join(missing)}: pip install {' '.join(missing)}")
    # In a process of its own: this one is to leave the GPU to the steps.
    finished = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    name = finished.stdout.strip()
    if not name:
        output = (finished.stderr.strip().splitlines() or ["torch finds none"])[-1]
        sys.exit(f"error: no GPU for {sys.executable}: {output}")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="for all steps together; default 60")
    parser.add_argument("--wheels", type=Path, help="the folder with axolotl's and Unsloth's wheels")
    arguments = parser.parse_args()
    if arguments.wheels and not arguments.wheels.is_dir():
        parser.error(f"--wheels: {arguments.wheels} is no folder")
    name = gpu_name([*NEEDED, *(PEERS_NEED if arguments.wheels else [])])
    folder = BENCHMARKS / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    wheels = arguments.wheels.resolve() if arguments.wheels else None
    todo = steps(folder, wheels)
    print(f"{name}: {len(todo)} steps in at most {arguments.minutes:g} minutes", flush=True)
    end_steps_when_ended()
    sys.exit(report(run_all(todo, folder, arguments.minutes), folder))


if __name__ == "__main__":
    main()
