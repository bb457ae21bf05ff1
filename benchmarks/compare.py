"""One MoE layer with PEFT LoRA on both projections, forward and backward: ours against transformers + PEFT.

Every row is a process of its own, so that one implementation's memory is not another's. Prints a table; ``--output``
also writes the figures as JSON.

    python benchmarks/compare.py [--shapes small,medium,large] [--implementations scattermoe,grouped_mm,...]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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
}
# batched_mm copies the weights of every pair: 33 GB for the medium shape, 24 GB for the large one, more in backward.
TOO_LARGE = {("medium", "batched_mm"), ("large", "batched_mm")}


def status(field: str) -> int:
    """A size from Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def median_seconds(step: Any, repeats: int = 7, budget: float = 30.0) -> tuple[float, int]:
    """Median seconds of ``step`` over at most ``repeats`` runs or ``budget`` seconds; the first run warms up."""
    start = time.perf_counter()
    step()
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or time.perf_counter() - start < budget):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), len(seconds)


def measure(shape: Shape, implementation: str) -> dict[str, Any]:
    """Runs in the child: seconds, peak memory above the weights and the dense rate of the same process."""
    import torch
    from kernels import get_kernel
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

    torch.manual_seed(0)
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

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    seconds, repeats = median_seconds(step)
    peak = status("VmHWM") - before
    a = torch.randn(2048, 2048).to(dtype)
    dense_seconds, _ = median_seconds(lambda: a @ a, repeats=15)
    dense_rate = 2 * 2048**3 / dense_seconds
    return {
        "ms": 1000 * seconds,
        "repeats": repeats,
        "peak_bytes_above_weights": peak,
        "share_of_dense_rate": shape.flops() / seconds / dense_rate,
        "dense_gflops": dense_rate / 1e9,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def run_child(shape: str, implementation: str, build: Path) -> dict[str, Any] | None:
    """The child's figures, or None where it was killed (out of memory)."""
    environment = {**os.environ, "LOCAL_KERNELS": f"org/scattermoe-lora={build}"}
    command = [sys.executable, __file__, "--child", shape, implementation]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode < 0:
        return None
    done.check_returncode()
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(shapes: list[str], implementations: list[str]) -> dict[str, Any]:
    """Runs every row and prints it as it comes."""
    from kernelpress.spec import load_spec
    from kernelpress.variant import build

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        built = build(load_spec(REPOSITORY), Path(scratch, "build"))
        header = f"{'':<12}{'ms':>9}{'runs':>6}{'MB above weights':>18}{'of dense rate':>15}"
        for name in shapes:
            print(f"\n{name}: {SHAPES[name]}, r={RANK}\n{header}", flush=True)
            rows = results.setdefault(name, {})
            for implementation in implementations:
                row = (
                    None
                    if (name, implementation) in TOO_LARGE
                    else run_child(name, implementation, built.directory)
                )
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
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        shape, implementation = arguments.child
        print(json.dumps(measure(SHAPES[shape], implementation)))
        return
    results = compare(arguments.shapes.split(","), arguments.implementations.split(","))
    if arguments.output:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        }
        arguments.output.write_text(json.dumps({"machine": machine, "shapes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
