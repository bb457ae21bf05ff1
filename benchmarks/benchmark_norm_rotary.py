"""Norms and rotary embedding of one Gemma 4 attention layer: queries, keys and values, against transformers' own code.

    python benchmarks/benchmark_norm_rotary.py [--device cuda] [--output benchmarks/results/NAME.json]

prints medians, memory, and the bandwidth that was reached over that of a copy in the same process; every row is a
process of its own. ``kernels benchmark`` runs the two workloads at the end of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernels.benchmark import Benchmark
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, apply_rotary_pos_emb


@dataclass(frozen=True)
class Layer:
    """Heads of queries and of keys (and values), and their size: Gemma 4's two kinds of layers."""

    heads: int
    kv_heads: int
    head_dim: int


LAYERS = {"sliding": Layer(8, 4, 256), "global": Layer(8, 2, 512)}
TOKENS = {"cpu": 4096, "cuda": 65536}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}


class Setup:
    """Random queries, keys and values of a layer, as views of projections' results, and gradients of what comes out."""

    def __init__(self, layer: Layer, tokens: int, dtype: torch.dtype, device: str) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        heads = (layer.heads, layer.kv_heads, layer.kv_heads)
        self.inputs = [
            random(1, tokens, h * layer.head_dim).view(1, tokens, h, layer.head_dim).requires_grad_()
            for h in heads
        ]
        # Attention's gradients come with heads before tokens.
        self.grads = [random(1, h, tokens, layer.head_dim).transpose(1, 2) for h in heads]
        self.norms = [Gemma4RMSNorm(layer.head_dim, with_scale=scaled) for scaled in (True, True, False)]
        for norm in self.norms:
            norm.to(device, dtype).requires_grad_(False)
        angles = torch.rand(1, tokens, layer.head_dim, device=device) * 6.3
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def ours(self, kernel: Any) -> list[torch.Tensor]:
        """The kernel's operator, three times."""
        angles = [(self.cos, self.sin), (self.cos, self.sin), (None, None)]
        return [
            kernel.rms_norm_rotary(x, norm.weight if norm.with_scale else None, cos, sin, norm.eps)
            for x, norm, (cos, sin) in zip(self.inputs, self.norms, angles, strict=True)
        ]

    def eager(self) -> list[torch.Tensor]:
        """transformers' norms and rotary embedding."""
        q, k, v = (norm(x) for x, norm in zip(self.inputs, self.norms, strict=True))
        return [apply_rotary_pos_emb(x, self.cos, self.sin, unsqueeze_dim=2) for x in (q, k)] + [v]

    def backward(self, results: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients of the inputs; the norms' weights are frozen, as under LoRA."""
        return list(torch.autograd.grad(results, self.inputs, self.grads))

    def megabytes(self) -> float:
        """Size of the inputs."""
        return sum(x.numel() * x.element_size() for x in self.inputs) / 1e6


def measure(implementation: str, kind: str, dtype: str, device: str) -> dict[str, float]:
    """Runs in the child: milliseconds and memory of a forward and a step, and a copy's bandwidth."""
    from kernels import get_kernel
    from measuring import LAUNCHES, median_seconds, peak_memory, start_memory

    torch.manual_seed(0)
    setup = Setup(LAYERS[kind], TOKENS[device], getattr(torch, dtype), device)
    kernel = get_kernel("org/scattermoe-lora", version=1)
    run: Callable[[], list[torch.Tensor]] = (
        setup.eager if implementation == "transformers" else lambda: setup.ours(kernel)
    )

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def seconds(step: Callable[[], Any]) -> float:
        return median_seconds(step, finish, repeats=7, budget=1.5, least=LAUNCHES[device])[0]

    with torch.no_grad():
        forward = seconds(run)
    before = start_memory(device)
    setup.backward(run())
    memory = (peak_memory(device) - before) / 1e6
    step = seconds(lambda: setup.backward(run()))
    targets = [torch.empty_like(x) for x in setup.inputs]
    with torch.no_grad():
        copy = seconds(lambda: [target.copy_(x) for target, x in zip(targets, setup.inputs, strict=True)])
    size = setup.megabytes()
    return {
        "forward_ms": 1e3 * forward,
        "step_ms": 1e3 * step,
        "peak_mb": memory,
        "inputs_mb": size,
        "copy_gb_per_s": 2 * size / 1e3 / copy,
        # The least that has to move: x and y forward; dy, x and dx backward.
        "forward_of_copy": copy / forward,
        "step_of_copy": 2.5 * copy / step,
    }


def run_child(implementation: str, kind: str, dtype: str, device: str, build: Path) -> dict[str, float]:
    """The figures of one row, from a process of its own."""
    environment = {**os.environ, "LOCAL_KERNELS": f"org/scattermoe-lora={build}"}
    command = [sys.executable, __file__, "--child", implementation, kind, dtype, "--device", device]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{implementation} failed on {kind} {dtype}:\n{finished.stderr}")
    row: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return row


def compare_all(device: str, build: Path, keep: Callable[[dict[str, Any]], None]) -> None:
    """Runs every row and prints it as it comes, and hands ``keep`` all there are."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind in LAYERS:
        for dtype in DTYPES[device]:
            print(f"\n{kind}: {LAYERS[kind]}, {TOKENS[device]} tokens, {dtype}")
            print(
                f"{'':<14}{'forward ms':>11}{'of copy':>9}{'step ms':>9}{'of copy':>9}{'peak MB':>9}",
                flush=True,
            )
            rows = results.setdefault(f"{kind} {dtype}", {})
            for implementation in ("transformers", "scattermoe"):
                row = rows[implementation] = run_child(implementation, kind, dtype, device, build)
                print(
                    f"{implementation:<14}{row['forward_ms']:>11.1f}{row['forward_of_copy']:>9.0%}{row['step_ms']:>9.1f}"
                    f"{row['step_of_copy']:>9.0%}{row['peak_mb']:>9.0f}",
                    flush=True,
                )
                keep(results)
            ours, theirs = rows["scattermoe"], rows["transformers"]
            ratios = [theirs[key] / ours[key] for key in ("forward_ms", "step_ms", "peak_mb")]
            print("{:<14}{:>10.2f}x{:>17.2f}x{:>17.2f}x".format("", *ratios))
            print(
                f"{'':<14}a copy of the inputs ({ours['inputs_mb']:.0f} MB): {ours['copy_gb_per_s']:.1f} GB/s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=TOKENS, default="cpu")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child, arguments.device)))
        return
    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec
    from measuring import REPOSITORY, device_name, require, write

    require(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        built = build(load_spec(REPOSITORY), Path(scratch, "build")).directory
        described = {"device": device_name(arguments.device)}
        compare_all(
            arguments.device,
            built,
            lambda results: write(arguments.output, {**described, "results": results}),
        )


# The runner allows an error of 0.01 whatever the results' size, and bfloat16 is off by more than that from 2 upwards.
SMALL = 1 / 8


# No Benchmark itself: the runner takes every one in this file, and refuses one without a workload.
class _Layer:
    seed = 0
    device: str
    kernel: Any
    out: torch.Tensor

    def setup(self) -> None:
        cpu = self.device == "cpu"
        dtype = getattr(torch, DTYPES["cpu" if cpu else "cuda"][0])
        self.data = Setup(LAYERS["sliding"], 512 if cpu else 8192, dtype, self.device)
        self.data.grads = [SMALL * grad for grad in self.data.grads]


class Forward(_Layer, Benchmark):
    """Queries, keys and values of a sliding layer, no gradients."""

    @torch.no_grad()
    def benchmark_forward(self) -> None:
        self.out = SMALL * torch.cat(self.data.ours(self.kernel), dim=2)

    @torch.no_grad()
    def verify_forward(self) -> torch.Tensor:
        return SMALL * torch.cat(self.data.eager(), dim=2)


class Training(_Layer, Benchmark):
    """Forward and backward; the result is the gradients."""

    def benchmark_step(self) -> None:
        self.out = torch.cat(self.data.backward(self.data.ours(self.kernel)), dim=2)

    def verify_step(self) -> torch.Tensor:
        return torch.cat(self.data.backward(self.data.eager()), dim=2)


if __name__ == "__main__":
    main()
