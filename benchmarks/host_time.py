"""Host time of one call of each operator, forward and backward: what Python, autograd and Triton's launcher take.

On small CPU tensors, so that computing takes next to nothing; by default the Triton kernels are launched on a made-up
GPU, to which each launch goes with all of its Python, up to the driver's own call. Prints the least and the median of
the CPU microseconds of a call (``time.process_time``). ``--package`` takes another copy of the package: run two
versions in turns to compare them.

    OMP_NUM_THREADS=1 python benchmarks/host_time.py [--native] [--profile] [--package DIRECTORY] [--cases norm,...]
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[1] / "torch-ext"
CALLS = 100
ROUNDS = 15
ROWS, COLUMNS = 8, 64


def simulate_launches() -> None:
    """Makes Triton compile for a GPU and launch on it by doing nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    def load_binary(*_: Any) -> tuple[Any, ...]:
        return 1, 1, 0, 0, 1024

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            launcher_cls=lambda *_: lambda *_: None,
            utils=SimpleNamespace(
                load_binary=load_binary,
                unload_module=lambda _: None,
                get_device_properties=lambda _: {"max_shared_mem": 232448},
            ),
        )
    )
    tile_tables = importlib.import_module("scattermoe_lora.ops.tile_tables")
    dispatch = importlib.import_module("scattermoe_lora.ops.dispatch")
    tile_tables.table_of = lambda _: "sm_90"
    dispatch.use_triton = lambda _: True


def leaf(*shape: int, needs: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_(needs)


def cases() -> dict[str, Callable[[], Any]]:
    """A call of each operator that returns what to differentiate."""
    ops = importlib.import_module("scattermoe_lora")
    norm = importlib.import_module("scattermoe_lora.ops.rms_norm.api")
    gated = importlib.import_module("scattermoe_lora.ops.gated_activation.api")
    projections = importlib.import_module("scattermoe_lora.ops.lora_linear.api")
    experts = importlib.import_module("scattermoe_lora.ops.experts.op")
    arguments = importlib.import_module("scattermoe_lora.ops.experts.arguments")
    gate = importlib.import_module("scattermoe_lora.ops.activation").Gate("silu")
    routing = importlib.import_module("scattermoe_lora.ops.routing")

    x, residual, weight = leaf(ROWS, COLUMNS), leaf(ROWS, COLUMNS), leaf(COLUMNS, needs=False)
    heads, of_head = leaf(1, ROWS, 4, COLUMNS), leaf(COLUMNS, needs=False)
    angles = torch.rand(1, ROWS, COLUMNS, dtype=torch.bfloat16)
    square, a, b = leaf(COLUMNS, COLUMNS, needs=False), leaf(4, COLUMNS), leaf(COLUMNS, 4)
    index = torch.arange(2 * ROWS).reshape(ROWS, 2) % 4
    stack, stack_a, stack_b = leaf(4, COLUMNS, COLUMNS, needs=False), leaf(4, 4, COLUMNS), leaf(4, COLUMNS, 4)
    sorting = routing.sort_by_expert(index, 4)
    layer = arguments.Operands(
        x,
        leaf(4, 2 * COLUMNS, COLUMNS, needs=False),
        stack,
        torch.rand(ROWS, 2).requires_grad_(),
        stack_a,
        leaf(4, 2 * COLUMNS, 4),
        leaf(4, 4, COLUMNS),
        stack_b,
        None,
        None,
        *sorting,
    )

    def mlp() -> torch.Tensor:
        def project(rows: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(rows, square)

        return gated.gated_mlp(x, project, project, project)

    return {
        "gated_activation": lambda: gated.gated_activation(x, residual),
        "gated_mlp": mlp,
        "rms_norm": lambda: norm.rms_norm(x, weight),
        "add_rms_norm": lambda: norm.add_rms_norm(x, residual, weight),
        "norm_rotary": lambda: ops.rms_norm_rotary(heads, of_head, angles, angles),
        "lora_linear": lambda: projections.lora_linear(x, [square], [a], [b])[0],
        "lora_linear_3": lambda: projections.lora_linear(x, 3 * [square], 3 * [a], 3 * [b]),
        "grouped_linear": lambda: ops.grouped_linear(x, stack, index, stack_a, stack_b),
        "experts": lambda: experts.experts(layer, gate, False, True)[0],
        "negation (torch's own)": lambda: x.neg(),
    }


def step_of(call: Callable[[], Any]) -> Callable[[], None]:
    """The call and the backward of what it returns."""
    results = call()
    several = isinstance(results, tuple | list)
    grads = [torch.ones_like(y) for y in (results if several else [results])]

    def step() -> None:
        results = call()
        torch.autograd.backward(results if several else [results], grads)

    return step


def microseconds(step: Callable[[], None]) -> list[float]:
    """CPU microseconds of a call, of each of some rounds."""
    for _ in range(5):
        step()
    times = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        for _ in range(CALLS):
            step()
        times.append((time.process_time() - begin) / CALLS * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--native", action="store_true", help="the CPU's own implementations, no launches")
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument(
        "--package", type=Path, default=PACKAGE, help="directory that contains scattermoe_lora"
    )
    parser.add_argument("--cases", help="of which operators, by commas")
    options = parser.parse_args()
    sys.path.insert(0, str(options.package))
    torch.set_num_threads(1)
    if not options.native:
        simulate_launches()
    operators = cases()
    for name in options.cases.split(",") if options.cases else operators:
        step = step_of(operators[name])
        times = microseconds(step)
        print(f"{name:24} {min(times):8.1f} {statistics.median(times):8.1f}", flush=True)
        if options.profile:
            profile = cProfile.Profile()
            profile.runcall(lambda step=step: [step() for _ in range(300)])
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()
