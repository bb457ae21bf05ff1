"""What ships of the grouped GEMMs, for compiling ahead of time: every tile configuration, every way of launching."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import tiles
from ..compile_spec import TARGETS, CompileSpec
from .kernels import grouped_matmul_kernel, grouped_outer_kernel

_POINTERS = {"row_weight_ptr": "*fp32:16", "order_ptr": "*i64:16", "offsets_ptr": "*i64:16"}
_DTYPES = {2: ("bf16", "fp16"), 4: ("fp32",)}


@dataclass(frozen=True)
class _Use:
    """A way in which the launcher calls ``grouped_matmul_kernel``; ``transposed`` is a weight read along N."""

    label: str
    gather: bool = False
    low_rank: bool = False
    transposed: bool = False
    bias: bool = False
    weighted: bool = False
    scatter: bool = False


# All that forward and backward of both operators ask of a wide product; each is launched without factors, too.
_USES = (
    _Use("forward", gather=True, low_rank=True, bias=True, scatter=True),
    _Use("gate/up", gather=True, low_rank=True, bias=True),
    _Use("down", low_rank=True, bias=True, weighted=True, scatter=True),
    _Use("d down", gather=True, low_rank=True, transposed=True),
    _Use("d gate/up", low_rank=True, transposed=True, scatter=True),
    _Use("dx", gather=True, low_rank=True, transposed=True, scatter=True),
    _Use("gate/up, no factors", gather=True),
    _Use("down, no factors", weighted=True, scatter=True),
    _Use("d down, no factors", gather=True, transposed=True),
    _Use("d gate/up, no factors", transposed=True, scatter=True),
)
# Products whose columns are the rank; each is launched without gathering, too, which needs less.
_NARROW = (_Use("x A^T", gather=True), _Use("dy B", gather=True, transposed=True))
# The two that need most stand for the rest on every tile but the last.
_LARGEST = (_USES[0], _USES[5])


def _split(launch: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    options = {name: value for name, value in launch.items() if name.startswith("num_")}
    return {name: value for name, value in launch.items() if name not in options}, options


def _pointer(name: str, dtype: str) -> str:
    return _POINTERS.get(name, f"*{dtype}:16")


def _matmul(
    use: _Use,
    dtype: str,
    precision: str,
    launch: Mapping[str, int],
    targets: tuple[str, ...],
    aligned: bool = True,
) -> CompileSpec:
    blocks, options = _split(launch)
    unit = ("stride_wn", "stride_bn") if use.transposed else ("stride_wk", "stride_br")
    constants: dict[str, Any] = {
        **dict.fromkeys(unit, 1),
        "GATHER": use.gather,
        "TOP_K": 8,
        "SCATTER": use.scatter,
        "LOW_RANK": use.low_rank,
        "BIAS": use.bias,
        "WEIGHTED": use.weighted,
        "EXPERTS_POW2": 256,
        "PRECISION": precision,
        "EVEN_K": aligned,
        "BLOCK_R": blocks["BLOCK_K"] if use.low_rank else 16,
        **blocks,
    }
    integer = "i32:16" if aligned else "i32"
    arguments = {
        name: _pointer(name, dtype)
        if name.endswith("_ptr")
        else "i32"
        if name in ("pairs", "num_experts")
        else integer
        for name in grouped_matmul_kernel.arg_names
        if name not in constants
    }
    shape = "x".join(str(blocks[f"BLOCK_{axis}"]) for axis in "MNK")
    label = f"{use.label} {dtype} {precision} {shape}{'' if aligned else ' unaligned'}"
    return CompileSpec(grouped_matmul_kernel, label, arguments, constants, options, targets)


def _outer(
    weighted: bool,
    dtype: str,
    precision: str,
    launch: Mapping[str, int],
    targets: tuple[str, ...],
    aligned: bool = True,
) -> CompileSpec:
    blocks, options = _split(launch)
    constants = {
        "GATHER_P": weighted,
        "GATHER_Q": not weighted,
        "TOP_K": 8,
        "WEIGHTED": weighted,
        "PRECISION": precision,
        **blocks,
    }
    arguments = {
        name: _pointer(name, dtype) if name.endswith("_ptr") else "i32:16" if aligned else "i32"
        for name in grouped_outer_kernel.arg_names
        if name not in constants
    }
    shape = "x".join(str(blocks[f"BLOCK_{axis}"]) for axis in "PQS")
    label = f"{'d down' if weighted else 'd gate/up'} {dtype} {precision} {shape}{'' if aligned else ' unaligned'}"
    return CompileSpec(grouped_outer_kernel, label, arguments, constants, options, targets)


def _uses(rule: tiles.Rule, is_last: bool, dtype: str) -> tuple[_Use, ...]:
    """Every use on the widest tile, on the rest the two that need most. float16 differs from bfloat16 in the name of
    the instruction alone, so the widest tile stands for it."""
    if rule.n is not None and rule.n <= 64:
        return _NARROW if dtype != "fp16" else ()
    return _USES if is_last and dtype == "bf16" else _LARGEST if is_last or dtype != "fp16" else ()


def _specs() -> Iterator[CompileSpec]:
    for device in tiles.available():
        # Shapes that are not aligned take the default's on every device.
        aligned = device != tiles.DEFAULT
        targets = (device,) if aligned else TARGETS
        # AMD's matrix cores multiply float32 as it is.
        nvidia = tuple(target for target in targets if target.startswith("sm_"))
        for kernel, rules in tiles.load(device).rules.items():
            last = {rule.bytes: rule for rule in rules}
            for rule, dtype in [(each, dtype) for each in rules for dtype in _DTYPES[each.bytes]]:
                is_last = aligned and rule is last[rule.bytes]
                for precision, fit in (("ieee", targets), ("tf32", nvidia)):
                    if not fit or (precision == "tf32" and dtype != "fp32"):
                        continue
                    if kernel == "grouped_matmul":
                        for use in _uses(rule, is_last, dtype):
                            yield _matmul(use, dtype, precision, rule.launch, fit, aligned)
                    elif dtype != "fp16" or is_last:
                        for weighted in (False, True):
                            yield _outer(weighted, dtype, precision, rule.launch, fit, aligned)


COMPILE_SPECS = list(_specs())
