"""Host time of one call of each operator, forward and backward: what Python, autograd and Triton's launcher take.

On small CPU tensors, so that computing takes next to nothing; by default the Triton kernels are launched on a made-up
GPU, to which each launch goes with all of its Python, up to the driver's own call. Beside them what a user would call
instead: transformers' code, and Liger's functions where ``liger-kernel`` is on ``PYTHONPATH``. Prints the least and the
median of the CPU microseconds of a call (``time.process_time``). ``--package`` takes another copy of the package: run
two versions in turns to compare them.

A GPU adds to these what its driver takes, for each launch and allocation, and a thread for the backward.

    OMP_NUM_THREADS=1 python benchmarks/host_time.py [--native] [--profile] [--package DIRECTORY] [--cases norm,...]
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[1] / "torch-ext"
CALLS = 100
ROUNDS = 15
ROWS, COLUMNS = 8, 64


def simulate_launches(folder: Path) -> None:
    """Makes Triton compile for a GPU and launch on it by its own launcher, to a driver that does nothing."""
    import stub_cuda

    stub_cuda.install(folder)
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
    decoding = importlib.import_module("scattermoe_lora.ops.quantization.decode")
    encoding = importlib.import_module("scattermoe_lora.ops.quantization.encode")
    gate = importlib.import_module("scattermoe_lora.ops.activation").Gate("silu")
    routing = importlib.import_module("scattermoe_lora.ops.routing")

    x, residual, weight = leaf(ROWS, COLUMNS), leaf(ROWS, COLUMNS), leaf(COLUMNS, needs=False)
    heads, of_head = leaf(1, ROWS, 4, COLUMNS), leaf(COLUMNS, needs=False)
    angles = torch.rand(1, ROWS, COLUMNS, dtype=torch.bfloat16)
    square, a, b = leaf(COLUMNS, COLUMNS, needs=False), leaf(4, COLUMNS), leaf(COLUMNS, 4)
    index = torch.arange(2 * ROWS).reshape(ROWS, 2) % 4
    stack, stack_a, stack_b = leaf(4, COLUMNS, COLUMNS, needs=False), leaf(4, 4, COLUMNS), leaf(4, COLUMNS, 4)
    sorting = routing.sort_by_expert(index, 4)
    q, k = leaf(1, 2 * ROWS, 4, COLUMNS), leaf(1, 2 * ROWS, 1, COLUMNS)
    labels, codes = torch.arange(ROWS), encoding.quantize(stack, "nf4")
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
        "gated_activation": lambda: gated.gated_activation(x, residual, "gelu_tanh"),
        "gated_mlp": mlp,
        "rms_norm": lambda: norm.rms_norm(x, weight),
        "add_rms_norm": lambda: norm.add_rms_norm(x, residual, weight),
        "norm_rotary": lambda: ops.rms_norm_rotary(heads, of_head, angles, angles),
        "lora_linear": lambda: projections.lora_linear(x, [square], [a], [b])[0],
        "lora_linear_3": lambda: projections.lora_linear(x, 3 * [square], 3 * [a], 3 * [b]),
        "grouped_linear": lambda: ops.grouped_linear(x, stack, index, stack_a, stack_b),
        "experts": lambda: experts.experts(layer, gate, False, True)[0],
        "attention": lambda: ops.flash_attn_func(q, k, k, causal=True, window_size=(4, 0)),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, square, labels),
        "few rows": lambda: ops.grouped_linear(x, codes, index, stack_a, stack_b),
        "decoding": lambda: decoding.decode(codes, slice(None)),
        "negation (torch's own)": lambda: x.neg(),
        **others(x, residual, weight),
    }


def others(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What a user would call instead: transformers' code, and Liger's functions where they are installed."""
    from compare_mlp import Case, Setup, eager, liger

    calls = {}
    for name, operation, inputs in (
        ("gated_activation", "geglu", [x, residual]),
        ("rms_norm", "norm", [x, weight]),
        ("add_rms_norm", "add-norm", [x, residual, weight]),
    ):
        setup = Setup(Case(operation, "bfloat16", ROWS, COLUMNS, COLUMNS), "cpu")
        for other, make in (("eager", eager), ("liger", liger)):
            try:
                calls[f"{name} {other}"] = partial(make(setup), *inputs)
            except ImportError as error:
                print(f"{name} {other}: {error}", file=sys.stderr)
    return calls


def step_of(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call and the backward of what it returns, where that has one."""
    results = call()
    several = isinstance(results, tuple | list)
    grads = [torch.ones_like(y) for y in (results if several else [results])]

    def step() -> None:
        results = call()
        torch.autograd.backward(results if several else [results], grads)

    return step if (results[0] if several else results).requires_grad else call


def microseconds(steps: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """CPU microseconds of a call of each, round by round: what is compared met the same load."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            step()
            begin = time.process_time()
            for _ in range(CALLS):
                step()
            times[name].append((time.process_time() - begin) / CALLS * 1e6)
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
    with tempfile.TemporaryDirectory() as folder:
        if not options.native:
            simulate_launches(Path(folder))
        show(options)


def show(options: argparse.Namespace) -> None:
    """Measures and prints the cases that are asked for."""
    operators = cases()
    names = options.cases.split(",") if options.cases else list(operators)
    steps = {name: step_of(operators[name]) for name in names}
    for name, times in microseconds(steps).items():
        print(f"{name:24} {min(times):8.1f} {statistics.median(times):8.1f}", flush=True)
        if options.profile:
            profile = cProfile.Profile()
            profile.runcall(lambda step=steps[name]: [step() for _ in range(300)])
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()
