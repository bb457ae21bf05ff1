"""One MoE layer with PEFT LoRA on both projections, forward and backward: ours against transformers + PEFT.

Every row is a process of its own, so that one implementation's memory is not another's. Prints a table of medians;
``--output`` also writes the figures as JSON, with the date, the device, the versions and the commit they belong to.

    python benchmarks/compare.py [--device cuda] [--shapes small,medium,large] [--implementations scattermoe,...]
    python benchmarks/compare.py --plot growth.png      time and memory against tokens and against experts
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RANK = 16
IMPLEMENTATIONS = ("scattermoe", "grouped_mm", "batched_mm", "eager")
BASELINES = IMPLEMENTATIONS[1:]


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer: experts, hidden, intermediate, top-k, tokens."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    tokens: int
    dtype: str

    def flops(self) -> int:
        """Multiplications and additions of the base weights' products, forward and backward of a frozen base."""
        pairs = self.tokens * self.top_k
        return 2 * (2 * pairs * self.hidden * 3 * self.intermediate)


SHAPES = {
    "small": Shape(32, 512, 256, 4, 512, "float32"),
    "medium": Shape(64, 1024, 512, 4, 1024, "float32"),
    "large": Shape(128, 1408, 704, 8, 512, "bfloat16"),
    # Layers of Gemma 4 26B-A4B, Qwen3-30B-A3B and Mixtral 8x7B.
    "gemma4": Shape(128, 2816, 704, 8, 8192, "bfloat16"),
    "qwen3": Shape(128, 2048, 768, 8, 8192, "bfloat16"),
    "mixtral": Shape(8, 4096, 14336, 2, 8192, "bfloat16"),
}
DEFAULT_SHAPES = {"cpu": "small,medium,large", "cuda": "gemma4,qwen3,mixtral"}
# What --plot varies the small shape (on a GPU Gemma 4's layer) over.
GROWTH = {"tokens": (128, 256, 512, 1024, 2048), "experts": (8, 16, 32, 64, 128)}
GROWING = ("scattermoe", "grouped_mm")
# batched_mm copies the weights of every pair: 33 GB for the medium shape, 24 GB for the large one, more in backward.
TOO_LARGE = {(name, "batched_mm") for name in SHAPES if name != "small"}


def status(field: str) -> int:
    """A size from Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def median_seconds(
    step: Callable[[], Any],
    finish: Callable[[], None],
    repeats: int = 7,
    budget: float = 30.0,
    steady: float = 0.0,
) -> tuple[float, int]:
    """Median seconds of ``step``, and the number of runs that it is the median of.

    The first run warms up and is not counted. At least ``repeats`` runs follow, and as many more as ``steady`` seconds
    hold (a few dozen milliseconds are soon disturbed); but none begins after ``budget`` seconds. ``finish`` waits until
    the device is done.
    """
    start = time.perf_counter()
    step()
    finish()
    seconds: list[float] = []
    while not seconds or (
        time.perf_counter() - start < budget and (len(seconds) < repeats or sum(seconds) < steady)
    ):
        begin = time.perf_counter()
        step()
        finish()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), len(seconds)


def device_name(device: str) -> str:
    """The GPU's name, or the processor's as Linux gives it, with its number of cores."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def start_memory(device: str) -> int:
    """Forgets the peak so far and returns the bytes in use."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_memory(device: str) -> int:
    """The most bytes in use since :func:`start_memory`."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def measure(shape: Shape, implementation: str, device: str) -> dict[str, Any]:
    """Runs in the child: seconds, peak memory above the weights and the dense rate of the same process."""
    import torch
    from kernels import get_kernel
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

    torch.manual_seed(0)
    torch.set_default_device(device)
    dtype = getattr(torch, shape.dtype)
    get_kernel("org/scattermoe-lora", version=1).register()
    config = Gemma4TextConfig(
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        top_k_experts=shape.top_k,
        enable_moe_block=True,
    )
    config._experts_implementation = implementation
    layer = torch.nn.Module()
    layer.experts = Gemma4TextExperts(config).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    lora = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    layer = inject_adapter_in_model(lora, layer)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    x = torch.randn(shape.tokens, shape.hidden).to(dtype).requires_grad_()
    index = torch.rand(shape.tokens, shape.experts).topk(shape.top_k).indices
    weights = torch.rand(shape.tokens, shape.top_k).to(dtype).requires_grad_()
    grad = torch.randn(shape.tokens, shape.hidden).to(dtype)
    leaves = [x, weights, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer.experts(x, index, weights).backward(grad)

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    before = start_memory(device)
    seconds, repeats = median_seconds(step, finish, steady=3.0)
    peak = peak_memory(device) - before
    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side).to(dtype)
    dense_seconds, _ = median_seconds(lambda: a @ a, finish, repeats=15)
    dense_rate = 2 * side**3 / dense_seconds
    return {
        "ms": 1000 * seconds,
        "repeats": repeats,
        "peak_bytes_above_weights": peak,
        "share_of_dense_rate": shape.flops() / seconds / dense_rate,
        "dense_gflops": dense_rate / 1e9,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


def run_child(shape: Shape, implementation: str, device: str, build: Path) -> dict[str, Any] | None:
    """The child's figures, or None where it was killed or its GPU's memory did not suffice."""
    environment = {**os.environ, "LOCAL_KERNELS": f"org/scattermoe-lora={build}"}
    command = [sys.executable, __file__, "--child", json.dumps(asdict(shape)), implementation, device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode < 0 or "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(f"{implementation} failed on {shape}:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(
    shapes: Sequence[str], implementations: Sequence[str], device: str, build: Path
) -> dict[str, Any]:
    """Runs every row and prints it as it comes."""
    results: dict[str, Any] = {}
    header = f"{'':<12}{'ms':>9}{'runs':>6}{'MB above weights':>18}{'of dense rate':>15}"
    for name in shapes:
        print(f"\n{name}: {SHAPES[name]}, r={RANK}\n{header}", flush=True)
        rows = results.setdefault(name, {})
        for implementation in implementations:
            too_large = (name, implementation) in TOO_LARGE
            row = None if too_large else run_child(SHAPES[name], implementation, device, build)
            if row is None:
                print(f"{implementation:<12}  does not fit in memory", flush=True)
                continue
            rows[implementation] = row
            megabytes = row["peak_bytes_above_weights"] / 1e6
            print(
                f"{implementation:<12}{row['ms']:>9.1f}{row['repeats']:>6}{megabytes:>18.0f}"
                f"{row['share_of_dense_rate']:>15.0%}",
                flush=True,
            )
        print_ratio(rows)
    return results


def grow(device: str, build: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Figures against each of ``GROWTH``: ``{"tokens": {implementation: [row, ...]}, "experts": ...}``."""
    base = SHAPES["gemma4" if device == "cuda" else "small"]
    grown: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for dimension, sizes in GROWTH.items():
        for implementation in GROWING:
            rows = grown.setdefault(dimension, {}).setdefault(implementation, [])
            for size in sizes:
                row = run_child(replace(base, **{dimension: size}), implementation, device, build)
                if row is not None:
                    rows.append({dimension: size, **row})
                    print(f"{dimension} {size}: {implementation} {row['ms']:.1f} ms", flush=True)
    return grown


def provenance() -> dict[str, Any]:
    """The date, the versions and the commit that figures belong to."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": done.stdout.strip(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers", "peft", "kernels")},
    }


def print_ratio(rows: dict[str, Any]) -> None:
    baselines = [rows[name] for name in BASELINES if name in rows]
    if "scattermoe" not in rows or not baselines:
        return
    ours, best = rows["scattermoe"], min(baselines, key=lambda row: row["ms"])
    memory = ours["peak_bytes_above_weights"] / best["peak_bytes_above_weights"]
    print(
        f"{'':<12}{best['ms'] / ours['ms']:>8.2f}x the best of transformers + PEFT, with {memory:.0%} of its memory"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEFAULT_SHAPES, default="cpu")
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; default {DEFAULT_SHAPES}")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument(
        "--plot", type=Path, help="instead draw time and memory against tokens and experts (PNG)"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        shape, implementation, device = arguments.child
        print(json.dumps(measure(Shape(**json.loads(shape)), implementation, device)))
        return
    shapes = (arguments.shapes or DEFAULT_SHAPES[arguments.device]).split(",")
    implementations = arguments.implementations.split(",")
    for option, names, known in (
        ("shapes", shapes, tuple(SHAPES)),
        ("implementations", implementations, IMPLEMENTATIONS),
    ):
        if unknown := set(names) - set(known):
            parser.error(f"--{option}: {', '.join(sorted(unknown))}: none of {', '.join(known)}")
    if arguments.plot:
        try:
            from plot import draw
        except ImportError as error:
            parser.error(f"--plot: {error}; install matplotlib")

    from kernelpress.spec import load_spec
    from kernelpress.variant import build

    with tempfile.TemporaryDirectory() as scratch:
        built = build(load_spec(REPOSITORY), Path(scratch, "build")).directory
        if arguments.plot:
            results = grow(arguments.device, built)
            draw(results, arguments.plot)
        else:
            results = compare(shapes, implementations, arguments.device, built)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({**provenance(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
