"""Times tile configurations on this machine's GPU, prints what it found and writes them for the kernel to ship.

    PYTHONPATH=torch-ext python benchmarks/tune.py [--output torch-ext/scattermoe_lora/ops/tiles/sm_90.json]

For every rule of the device's table the candidates are timed on a shape that the rule serves; the fastest replaces the
rule's launch. A candidate that does not fit the GPU is left out. Routing is uniform: each expert has equally many rows.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from scattermoe_lora.ops import tiles
from scattermoe_lora.ops.grouped_linear import gpu
from scattermoe_lora.ops.routing import sort_by_expert
from triton.testing import do_bench

EXPERTS = 32
# Where a rule sets no limit: rows an expert, and sizes of a projection, of models that people train.
ROWS, WIDE = 512, 2816
SIDES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Found:
    """What tuning one rule gave: milliseconds of the launch it had, and of the fastest one."""

    kernel: str
    rule: tiles.Rule
    before: float
    launch: dict[str, int]
    after: float


def candidates(kernel: str, rule: tiles.Rule) -> Iterator[dict[str, int]]:
    """Launches worth timing: blocks that the rule's shapes fill, and 2 to 128 results a thread, of whose 255 registers
    the rest holds addresses."""
    sides, limits = ("BLOCK_M", "BLOCK_N", "BLOCK_K"), (rule.rows, rule.n, rule.k)
    if kernel == "grouped_outer":
        sides, limits = ("BLOCK_P", "BLOCK_Q", "BLOCK_S"), (rule.k, rule.n, rule.rows)
    ordering = {name: value for name, value in rule.launch.items() if name == "GROUP_M"}
    # A size without a limit is large, and fills at least 64.
    first, second = (
        [s for s in SIDES if (s >= 64 if limit is None else s <= max(16, limit))] for limit in limits[:2]
    )
    for blocks in itertools.product(first, second, (16, 32, 64, 128)):
        for warps, stages in itertools.product((4, 8), (2, 3, 4)):
            if 2 <= blocks[0] * blocks[1] / (32 * warps) <= 128:
                launch = {**dict(zip(sides, blocks, strict=True)), **ordering}
                yield {**launch, "num_warps": warps, "num_stages": stages}


def problem(kernel: str, rule: tiles.Rule) -> Callable[[], torch.Tensor]:
    """A product that the rule serves, on the GPU, as a call to time."""
    dtype = torch.bfloat16 if rule.bytes == 2 else torch.float32
    rows, n, k = rule.rows or ROWS, rule.n or WIDE, rule.k or WIDE
    index = torch.arange(EXPERTS, device="cuda").repeat(rows).view(-1, 1)
    order, offsets = sort_by_expert(index, EXPERTS)
    left = torch.randn(EXPERTS * rows, k, device="cuda", dtype=dtype)
    if kernel == "grouped_matmul":
        weight = torch.randn(EXPERTS, n, k, device="cuda", dtype=dtype)
        return lambda: gpu.grouped_matmul(left, weight, order, offsets, top_k=1)
    right = torch.randn(EXPERTS * rows, n, device="cuda", dtype=dtype)
    return lambda: gpu.grouped_outer(left, right, order, offsets, top_k_q=1)


def milliseconds(call: Callable[[], torch.Tensor], launch: dict[str, int]) -> float | None:
    """Median time of ``call`` with this launch, or None where the GPU cannot run it."""
    with mock.patch.object(tiles, "launch", return_value=launch):
        try:
            return float(do_bench(call, return_mode="median"))
        except (triton.OutOfResources, triton.CompilationError):
            return None


def tune(kernel: str, rule: tiles.Rule) -> Found:
    """Time all candidates for one rule."""
    call = problem(kernel, rule)
    before = milliseconds(call, dict(rule.launch))
    timed = [
        (time, launch)
        for launch in candidates(kernel, rule)
        if (time := milliseconds(call, launch)) is not None
    ]
    if before is not None:
        timed.append((before, dict(rule.launch)))
    after, launch = min(timed, key=lambda pair: pair[0])
    return Found(kernel, rule, float("inf") if before is None else before, launch, after)


def render(measured: dict[str, str], found: list[Found]) -> str:
    """The table's file, one rule a line, as :func:`scattermoe_lora.ops.tiles.load` reads it."""
    parts = [f'  "measured": {json.dumps(measured)}']
    for kernel, group in itertools.groupby(found, key=lambda each: each.kernel):
        lines = [
            "    "
            + json.dumps(
                {"bytes": e.rule.bytes, "rows": e.rule.rows, "n": e.rule.n, "k": e.rule.k, "launch": e.launch}
            )
            for e in group
        ]
        parts.append(f'  "{kernel}": [\n' + ",\n".join(lines) + "\n  ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the table here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: tuning times kernels on a GPU, and this machine has none")
    device = tiles.table_of(torch.device("cuda", torch.cuda.current_device()))
    found = []
    for kernel, rules in tiles.load(device).rules.items():
        for rule in rules:
            each = tune(kernel, rule)
            found.append(each)
            shape = f"bytes {rule.bytes}, rows {rule.rows}, n {rule.n}, k {rule.k}"
            print(f"{kernel} {shape}: {each.before:.4f} -> {each.after:.4f} ms, {each.launch}", flush=True)
    measured = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if arguments.output:
        arguments.output.write_text(render(measured, found))


if __name__ == "__main__":
    main()
