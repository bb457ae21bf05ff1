"""The kernels of the gated experts, beside the grouped GEMMs, to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..activation import ACTIVATIONS
from ..compile_spec import TARGETS, CompileSpec, distinct
from ..grouped_linear.specs import OPTION_TARGETS, POINTERS, Tile, Use, matmul_spec, tiles_of
from .kernels import gate_backward_kernel, gate_forward_kernel, gate_up_kernel
from .kernels_backward import matmul_gate_backward_kernel

_PLAIN = {"INTERLEAVED": False, "ALPHA": 1.0, "LIMIT": None, "SHIFT": 0.0}
# gpt-oss's needs most: it stands for the rest on most tiles.
_CLAMPED = {"ACTIVATION": "silu", "INTERLEAVED": True, "ALPHA": 1.702, "LIMIT": 7.0, "SHIFT": 1.0}
_GATES: dict[str, dict[str, Any]] = {
    **{name: {"ACTIVATION": name, **_PLAIN} for name in ACTIVATIONS},
    "clamped silu": _CLAMPED,
}


def _gates(tile: Tile) -> tuple[str, ...]:
    if tile.every_use and tile.dtype == "bf16":
        return tuple(_GATES)
    return ("clamped silu",) if tile.every_use or tile.dtype != "fp16" else ()


def _matmuls() -> Iterator[CompileSpec]:
    fullest = {"GATHER": True, "LOW_RANK": True, "BIAS": True, "KEEP": True}
    for tile in tiles_of("grouped_matmul"):
        for label in _gates(tile):
            gate = _GATES[label]
            # Weights are transposed in gpt-oss, and with other gates in Llama 4.
            transposed = label == "clamped silu"
            uses = [Use(label, {**fullest, **gate}, transposed)]
            if label == "silu":
                uses.append(Use("silu, transposed", {**fullest, **gate}, True))
            if tile.every_use:
                uses.append(Use(f"{label}, inference without factors", {"GATHER": True, **gate}, transposed))
            for use in uses:
                yield matmul_spec(gate_up_kernel, use, tile)


def _matmuls_backward() -> Iterator[CompileSpec]:
    """On the tiles that a table launches so, and the widest of those that were not timed."""
    flags = {"GATHER": True, "LOW_RANK": True}
    for tile in tiles_of("grouped_matmul"):
        is_trial = tile.every_use and tile.timing is None and tile.targets == OPTION_TARGETS["GATE_BACKWARD"]
        if tile.dtype == "bf16" and (is_trial or tile.rule.launch.get("GATE_BACKWARD")):
            for label in ACTIVATIONS:
                gate = {name: value for name, value in _GATES[label].items() if name != "INTERLEAVED"}
                yield matmul_spec(matmul_gate_backward_kernel, Use(label, {**flags, **gate}, True), tile)


def _gates_alone() -> Iterator[CompileSpec]:
    for label, gate in _GATES.items():
        for dtype in ("bf16", "fp32"):
            for block in (128, 1024):
                constants = {**gate, "BLOCK": block}
                for kernel in (gate_forward_kernel, gate_backward_kernel):
                    arguments = {
                        name: POINTERS.get(name, f"*{dtype}:16") if name.endswith("_ptr") else "i32:16"
                        for name in kernel.arg_names
                        if name not in constants
                    }
                    options = {"num_warps": 4}
                    yield CompileSpec(
                        kernel, f"{label} {dtype} {block}", arguments, constants, options, TARGETS
                    )


COMPILE_SPECS = distinct([*_matmuls(), *_matmuls_backward(), *_gates_alone()])
