"""The loss's kernels to compile ahead of time: for Gemma 4's head, one with all options, and an awkward one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..compile_spec import TARGETS, CompileSpec, distinct
from ..tile_tables import DEFAULT, DEVICES, load
from .gpu import _RANK_BLOCK, TILES
from .gpu_total import LAUNCH
from .kernels import logits_backward_kernel, logits_forward_kernel
from .kernels_total import logits_gradient_kernel


class _Use(NamedTuple):
    """What a head has: its dtype, and the flags of the kernels that are on."""

    name: str
    dtype: str
    on: tuple[str, ...]


_USES = (
    _Use("gemma", "bf16", ("SOFTCAP", "EVEN_K")),
    _Use("plain", "fp32", ("EVEN_K",)),
    _Use(
        "all",
        "fp16",
        ("BIAS", "LOW_RANK", "SOFTCAP", "SUMS", "CLASS_WEIGHT", "ENTROPIES", "PEAKS", "SQUARE", "EVEN_K"),
    ),
    _Use("unaligned", "bf16", ()),
)
_FLAGS = ("BIAS", "LOW_RANK", "SOFTCAP", "SUMS", "CLASS_WEIGHT", "ENTROPIES", "PEAKS", "SQUARE", "EVEN_K")
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Pointers that a launch without the flag passes nothing for.
_OPTIONAL = {
    "bias_ptr": "BIAS",
    "low_ptr": "LOW_RANK",
    "b_ptr": "LOW_RANK",
    "class_weight_ptr": "CLASS_WEIGHT",
    "smooth_ptr": "SUMS",
    "square_ptr": "SQUARE",
}
_FLOAT32 = (
    "x_ptr", "lse_ptr", "label_logit_ptr", "sums_ptr", "mean_ptr", "peak_ptr", "entropy_ptr", "slope_ptr",
    "own_ptr", "smooth_ptr", "square_ptr",
)  # fmt: skip
# The default serves no architecture that is compiled for; this one has the least shared memory.
_LEAST = ("gfx90a",)


def _kind(name: str, use: _Use) -> str:
    if name == "labels_ptr":
        return "*i64:16"
    if name in _FLOAT32 or (name.startswith("d_") and name not in ("d_ptr", "d_stride")):
        return "*fp32:16"
    if name.endswith("_ptr"):
        return f"*{use.dtype}:16"
    if name in ("scale", "softcap"):
        return "fp32"
    return "i32:16" if name in ("H", "R", "words", "x_stride", "d_stride") and "EVEN_K" in use.on else "i32"


def _spec(
    kernel: Any, use: _Use, launch: Mapping[str, int], targets: tuple[str, ...], label: str
) -> CompileSpec:
    options = {name: launch[name] for name in ("num_warps", "num_stages")}
    constants: dict[str, Any] = {name: name in use.on for name in _FLAGS}
    constants |= {name: size for name, size in launch.items() if name not in options}
    constants |= {"PRECISION": "ieee", "BLOCK_R": _RANK_BLOCK}
    constants |= {name: None for name, flag in _OPTIONAL.items() if flag not in use.on}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    arguments = {name: _kind(name, use) for name in kernel.arg_names if name not in constants}
    return CompileSpec(kernel, label, arguments, constants, options, targets)


def _specs() -> Iterator[CompileSpec]:
    for kernel in (logits_forward_kernel, logits_backward_kernel):
        for use in _USES:
            for device in DEVICES:
                if "EVEN_K" not in use.on and device != DEFAULT:
                    continue
                table = load(TILES, device)
                name = kernel.__name__.removesuffix("_kernel")
                rule = next(rule for rule in table.rules[name] if rule.serves(_BYTES[use.dtype], {}))
                for target in (
                    TARGETS if "EVEN_K" not in use.on else _LEAST if device == DEFAULT else (device,)
                ):
                    label = f"{'default ' if device == DEFAULT else ''}{use.dtype} {use.name}"
                    yield _spec(kernel, use, rule.launch, (target,), label)
    for use in _USES:
        yield _spec(logits_gradient_kernel, use, LAUNCH, TARGETS, f"{use.dtype} {use.name}")


COMPILE_SPECS = distinct(_specs())
