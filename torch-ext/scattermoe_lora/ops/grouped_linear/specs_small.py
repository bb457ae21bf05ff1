"""The small kernels around the grouped GEMMs, to compile ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ..compile_spec import TARGETS, CompileSpec, distinct
from ..tile_tables import DEFAULT, DEVICES, load
from .kernels_pairs import count_pairs_kernel, place_pairs_kernel, sum_choices_kernel
from .kernels_schedule import tile_schedule_kernel
from .kernels_transpose import scaled_transpose_kernel
from .pairs import CHUNK, TILES
from .schedule import TILES_A_PROGRAM
from .specs import POINTERS


def _schedules() -> Iterator[CompileSpec]:
    for block in (16, 128):
        yield CompileSpec(
            tile_schedule_kernel,
            f"{block} rows",
            {
                "offsets_ptr": "*i64:16",
                "schedule_ptr": "*i32:16",
                **dict.fromkeys(("pairs", "num_experts", "size", "capacity"), "i32"),
            },
            {"EXPERTS_POW2": 256, "BLOCK_M": block, "TILES": TILES_A_PROGRAM},
            {"num_warps": 4},
            TARGETS,
        )


def _launches(
    kernel: str, *trials: tuple[int, int]
) -> Iterator[tuple[int, int, tuple[str, ...], str | None]]:
    """``(BLOCK, num_warps, targets, timing)`` of what tables launch a kernel with, and of trials for all devices."""
    for device in DEVICES:
        table = load(TILES, device)
        for rule in table.rules.get(kernel, ()):
            timing = table.timing(rule)
            targets = TARGETS if device == DEFAULT else (device,)
            measured = None if timing is None else str(timing)
            yield rule.launch["BLOCK"], rule.launch.get("num_warps", 4), targets, measured
    for block, warps in trials:
        yield block, warps, TARGETS, None


def _of_pairs() -> Iterator[CompileSpec]:
    """The kernels around the products, of which a table may have rules."""
    integers = dict.fromkeys(("pairs", "num_experts"), "i32")
    pointers = dict.fromkeys(("counts_ptr", "through_ptr"), "*i32:16")
    index = {"index_ptr": "*i64:16", **pointers, **POINTERS, **integers}
    for block, warps, targets, measured in _launches("sort_pairs", (128, 4), (256, 4), (512, 4)):
        constants = {"EXPERTS_POW2": 256, "BLOCK": block, "CHUNK": CHUNK}
        for kernel in (count_pairs_kernel, place_pairs_kernel):
            yield CompileSpec(
                kernel,
                f"{block} pairs",
                {name: index[name] for name in kernel.arg_names if name in index},
                {name: value for name, value in constants.items() if name in kernel.arg_names},
                {"num_warps": warps},
                targets,
                measured,
            )
    launches = list(_launches("sum_choices", (1024, 4), (4096, 8)))
    for dtype, (block, warps, targets, measured) in itertools.product(("bf16", "fp32"), launches):
        arguments = {"by_pair_ptr": f"*{dtype}:16", "out_ptr": f"*{dtype}:16", "columns": "i32:16"}
        constants = {"TOP_K": 8, "BLOCK": block}
        yield CompileSpec(
            sum_choices_kernel,
            f"{dtype} {block}",
            arguments,
            constants,
            {"num_warps": warps},
            targets,
            measured,
        )


def _transposes() -> Iterator[CompileSpec]:
    """Of adapters in the weights' dtype, and of wider ones: there, and their gradients back."""
    for source, target in (("bf16", "bf16"), ("fp32", "bf16"), ("bf16", "fp32")):
        for blocks in ((64, 64), (512, 8), (8, 512)):
            arguments = {
                "matrix_ptr": f"*{source}:16",
                "out_ptr": f"*{target}:16",
                "scaling": "fp32",
                **dict.fromkeys(("rows", "columns"), "i32:16"),
            }
            constants = dict(zip(("BLOCK_ROWS", "BLOCK_COLUMNS"), blocks, strict=True))
            label = f"{source} to {target} {blocks[0]}x{blocks[1]}"
            yield CompileSpec(scaled_transpose_kernel, label, arguments, constants, {"num_warps": 4}, TARGETS)


COMPILE_SPECS = distinct([*_schedules(), *_of_pairs(), *_transposes()])
