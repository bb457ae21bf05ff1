"""The RMSNorm and rotary kernels to compile ahead of time: for Gemma 4's heads, and for an awkward one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..compile_spec import TARGETS, CompileSpec
from ..tile_tables import DEFAULT, DEVICES, load
from .gpu import TILES, constants_of
from .kernels import rotary_backward_kernel, rotary_forward_kernel


class _Use(NamedTuple):
    head_dim: int
    rotated: int
    heads: int
    dtype: str
    weighted: bool = True


# Queries and keys of a sliding and of a global layer; values; what needs most masks, a partial rotation of a size that
# is no power of two; and a norm that rotates nothing.
_USES = (
    _Use(256, 256, 8, "bf16"),
    _Use(512, 512, 8, "bf16"),
    _Use(512, 512, 8, "fp32"),
    _Use(512, 0, 4, "bf16", weighted=False),
    _Use(80, 32, 3, "fp16"),
    _Use(256, 0, 4, "bf16"),
)
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# The default serves no architecture that is compiled for; this one has the least shared memory.
_LEAST = ("gfx90a",)
# What a table may turn on, together; of the uses above those that a table would do so for.
_OPTIONAL = (
    {"ELEMENTS": 2048, "PRELOAD": 1, "PROGRAMS": 4, "num_warps": 4, "num_stages": 2},
    {"ELEMENTS": 1024, "BY_TOKEN": 1, "PROGRAMS": 8, "num_warps": 4, "num_stages": 1},
    {"ELEMENTS": 512, "PRELOAD": 1, "PROGRAMS": 16, "num_warps": 1, "num_stages": 1},
)


def _kind(name: str, dtype: str) -> str:
    """Pointers and the strides of rows are divisible by 16; counts of rows and blocks need not be."""
    if name.endswith("_ptr"):
        return "*fp32:16" if name == "d_weight_ptr" else f"*{dtype}:16"
    return "fp32" if name == "eps" else "i32:16" if name.startswith("stride") else "i32"


def _spec(
    kernel: Any,
    use: _Use,
    launch: Mapping[str, int],
    flags: dict[str, bool],
    kind: str,
    targets: tuple[str, ...],
) -> CompileSpec:
    summed = flags.get("NEED_WEIGHT", False)
    constants: dict[str, Any] = {
        "WEIGHTED": use.weighted,
        **flags,
        **constants_of(launch, use.heads, use.head_dim, use.rotated),
    }
    options = {"num_warps": constants.pop("num_warps")}
    absent = [*([] if use.weighted else ["weight_ptr"]), *([] if use.rotated else ["cos_ptr", "sin_ptr"])]
    if kernel is rotary_backward_kernel and not summed:
        absent.append("d_weight_ptr")
    constants.update(dict.fromkeys(absent))
    arguments = {name: _kind(name, use.dtype) for name in kernel.arg_names if name not in constants}
    parts = f"{', d weight' if summed else ''}{'' if use.weighted else ', no weight'}"
    label = f"{kind}{use.dtype} {use.head_dim} rotated {use.rotated}{parts}"
    return CompileSpec(kernel, label, arguments, constants, options, targets)


def _launches(use: _Use) -> Iterator[tuple[Any, dict[str, bool], str]]:
    """Kernels and their flags with which a use runs, and the kernels' names in the tables."""
    yield rotary_forward_kernel, {}, "rotary_forward"
    for summed in (False, True) if use.weighted else (False,):
        yield rotary_backward_kernel, {"NEED_X": True, "NEED_WEIGHT": summed}, "rotary_backward"


def _specs() -> Iterator[CompileSpec]:
    for use in _USES:
        for kernel, flags, name in _launches(use):
            summed = flags.get("NEED_WEIGHT", False)
            sizes = {
                "head_dim": use.head_dim,
                "heads": use.heads,
                "rotated": use.rotated > 0,
                "d_weight": summed,
            }
            for device in DEVICES:
                table = load(TILES, device)
                rule = next(rule for rule in table.rules[name] if rule.serves(_BYTES[use.dtype], sizes))
                kind, targets = ("default ", _LEAST) if device == DEFAULT else ("", (device,))
                timing = table.timing(rule)
                measured = None if timing is None else str(timing)
                yield replace(_spec(kernel, use, rule.launch, flags, kind, targets), measured=measured)
    for use in _USES[:2]:
        for number, launch in enumerate(_OPTIONAL, 1):
            for kernel, flags, _ in _launches(use):
                if kernel is rotary_forward_kernel or flags["NEED_WEIGHT"]:
                    yield _spec(kernel, use, launch, flags, f"optional {number} ", TARGETS)


COMPILE_SPECS = list(_specs())
