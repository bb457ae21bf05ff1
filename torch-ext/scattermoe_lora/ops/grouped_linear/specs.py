"""The grouped GEMMs to compile ahead of time: every tile configuration, every way of launching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..compile_spec import TARGETS, CompileSpec, distinct
from ..tile_tables import DEFAULT, DEVICES, Rule, Timing, load
from .descriptors import box_of
from .gpu import TILES
from .kernels import grouped_matmul_kernel
from .kernels_outer import grouped_outer_kernel

POINTERS = {
    "row_weight_ptr": "*fp32:16",
    "d_row_weight_ptr": "*fp32:16",
    "order_ptr": "*i64:16",
    "offsets_ptr": "*i64:16",
    "schedule_ptr": "*i32:16",
}
_DTYPES = {2: ("bf16", "fp16"), 4: ("fp32",)}
# Architectures whose table may take an option of the products.
OPTION_TARGETS: Mapping[str, tuple[str, ...]] = {
    "SCHEDULE": TARGETS,
    "PERSISTENT": TARGETS,
    # Triton 3.9 cannot compile it for sm_100, and before Hopper it spills.
    "FLATTEN": ("sm_90",),
    "TMA": ("sm_90", "sm_100", "sm_120"),
    "TMA_ROWS": ("sm_90", "sm_100", "sm_120"),
    # Elsewhere torch has no kernel of its own for a grouped product.
    "LIBRARY": ("sm_90", "sm_100"),
    # Elsewhere it has not been compiled for every tile.
    "GATE_BACKWARD": ("sm_90",),
}
# Options that are compiled together for every architecture that may take them, whether its table does or not.
_TRIALS = (
    ("SCHEDULE",),
    ("PERSISTENT",),
    ("TMA",),
    ("TMA", "TMA_ROWS"),
    ("PERSISTENT", "FLATTEN", "TMA"),
    ("PERSISTENT", "FLATTEN", "TMA", "TMA_ROWS"),
    ("SCHEDULE", "LIBRARY"),
)


@dataclass(frozen=True)
class Use:
    """A way in which a launcher calls a kernel that multiplies rows.

    Attributes:
        label: What for.
        flags: The kernel's constants that are not the tile's; those left out are false.
        transposed: Whether the weight is read along N.
    """

    label: str
    flags: Mapping[str, Any]
    transposed: bool = False


def _use(label: str, *flags: str, transposed: bool = False) -> Use:
    return Use(label, dict.fromkeys(flags, True), transposed)


# All that forward and backward of both operators ask of a wide product; each is launched without factors, too.
_USES = (
    _use("forward", "GATHER", "LOW_RANK", "BIAS", "SCATTER"),
    _use("down", "LOW_RANK", "BIAS", "WEIGHTED", "SCATTER"),
    _use("d down", "GATHER", "LOW_RANK", transposed=True),
    _use("d gate/up", "LOW_RANK", "SCATTER", transposed=True),
    _use("dx", "GATHER", "LOW_RANK", "SCATTER", transposed=True),
    _use("forward, no factors", "GATHER", "SCATTER"),
    _use("down, no factors", "WEIGHTED", "SCATTER"),
    _use("d down, no factors", "GATHER", transposed=True),
    _use("d gate/up, no factors", "SCATTER", transposed=True),
    _use("dx, no factors", "GATHER", "SCATTER", transposed=True),
)
# Products whose columns are the rank; each is launched without gathering, too, which needs less.
_NARROW = (_use("x A^T", "GATHER"), _use("dy B", "GATHER", transposed=True))
# The two that need most stand for the rest on most tiles.
_LARGEST = (_USES[0], _USES[4])


@dataclass(frozen=True)
class Tile:
    """One rule of one table, as it is compiled: for whom, of which type, and whether its sizes are multiples of 16.

    ``every_use`` tells the widest tile, and those that were timed, on which every way of launching is compiled.
    """

    rule: Rule
    every_use: bool
    dtype: str
    precision: str
    targets: tuple[str, ...]
    aligned: bool
    timing: Timing | None

    def blocks(self) -> dict[str, int]:
        """The launch's constants."""
        others = ("num_warps", "num_stages", "GATE_BACKWARD")
        return {name: value for name, value in self.rule.launch.items() if name not in others}

    def options(self) -> dict[str, int]:
        """The launch's options of the compiler."""
        return {name: value for name, value in self.rule.launch.items() if name.startswith("num_")}

    def label(self, use: str, axes: str) -> str:
        """Tells a use of this tile from the kernel's others."""
        shape = "x".join(str(self.rule.launch[f"BLOCK_{axis}"]) for axis in axes)
        options = "".join(f" {name.lower()}" for name in OPTION_TARGETS if self.rule.launch.get(name))
        return f"{use} {self.dtype} {self.precision} {shape}{'' if self.aligned else ' unaligned'}{options}"

    def spec(self, kernel: Any, label: str, constants: Mapping[str, Any]) -> CompileSpec:
        """The compilation of a kernel with these constants."""
        integer = "i32:16" if self.aligned else "i32"
        arguments = {
            name: POINTERS.get(name, f"*{self.dtype}:16")
            if name.endswith("_ptr")
            else "i32"
            if name in ("pairs", "num_experts")
            else integer
            for name in kernel.arg_names
            if name not in constants
        }
        # The timing was of bfloat16.
        measured = str(self.timing) if self.timing and self.dtype == "bf16" else None
        return CompileSpec(kernel, label, arguments, constants, self.options(), self.targets, measured)


def _trials(rule: Rule, device: str) -> Iterator[Rule]:
    """The rule with each of the trials' options that the device can take."""
    for options in _TRIALS:
        if all(device in OPTION_TARGETS[option] for option in options):
            # One loop over all tiles has the low-rank factors in flight, too: a stage less fits.
            stages = {"num_stages": rule.launch["num_stages"] - ("FLATTEN" in options)}
            yield replace(rule, launch={**rule.launch, **stages, **dict.fromkeys(options, 1)}, measured=None)


def _without_library(rules: Iterable[Rule]) -> Iterator[Rule]:
    """The rules that ask for torch's product, as they are launched where it does not serve a call."""
    for rule in rules:
        if rule.launch.get("LIBRARY"):
            yield replace(rule, launch={**rule.launch, "LIBRARY": 0})


def tiles_of(kernel: str) -> Iterator[Tile]:
    """Every rule that ships for a kernel, for each type and precision that it is launched with."""
    for device in DEVICES:
        # Shapes that are not aligned take the default's on every device.
        aligned = device != DEFAULT
        targets = (device,) if aligned else TARGETS
        # AMD's matrix cores multiply float32 as it is.
        nvidia = tuple(target for target in targets if target.startswith("sm_"))
        table = load(TILES, device)
        rules = table.rules[kernel]
        last = {rule.bytes: rule for rule in rules}
        trials = _trials(last[2], device) if kernel == "grouped_matmul" else ()
        for rule in (*rules, *trials, *_without_library(rules)):
            for dtype in ("bf16",) if rule.launch.get("LIBRARY") else _DTYPES[rule.bytes]:
                every_use = aligned and (rule is last[rule.bytes] or _is_timed_and_wide(rule))
                for precision, fit in (("ieee", targets), ("tf32", nvidia)):
                    if fit and (precision == "ieee" or dtype == "fp32"):
                        yield Tile(rule, every_use, dtype, precision, fit, aligned, table.timing(rule))


def _is_timed_and_wide(rule: Rule) -> bool:
    columns = rule.largest("n")
    return rule.measured is not None and (columns is None or columns > 64)


def matmul_spec(kernel: Any, use: Use, tile: Tile) -> CompileSpec:
    """A kernel that multiplies rows, used in one way on one tile."""
    blocks = tile.blocks()
    unit = ("stride_wn", "stride_bn") if use.transposed else ("stride_wk", "stride_br")
    constants: dict[str, Any] = {
        **dict.fromkeys((name for name in kernel.arg_names if name.isupper() and len(name) > 1), False),
        **dict.fromkeys(unit, 1),
        **use.flags,
        "TOP_K": 8,
        "EXPERTS_POW2": 256,
        "PRECISION": tile.precision,
        "EVEN_K": tile.aligned,
        "BLOCK_R": blocks["BLOCK_K"] if "LOW_RANK" in use.flags else 16,
        **blocks,
    }
    persistent, flatten = (bool(constants.pop(name, False)) for name in ("PERSISTENT", "FLATTEN"))
    is_share = "PERSISTENT" in use.flags
    constants["SCHEDULE"] = bool(constants["SCHEDULE"]) or persistent or is_share
    # Torch's product has its rows in order.
    constants |= {
        "LIBRARY": bool(constants["LIBRARY"]),
        "GATHER": constants["GATHER"] and not constants["LIBRARY"],
    }
    constants["TMA_ROWS"] = (
        bool(constants["TMA_ROWS"]) and not constants["GATHER"] and not constants["LIBRARY"]
    )
    if "FLATTEN" in kernel.arg_names:
        constants |= {"PERSISTENT": persistent or is_share, "FLATTEN": flatten, "SHORT_RANK": flatten}
    spec = tile.spec(kernel, tile.label(use.label, "MNK"), constants)
    if constants["TMA_ROWS"]:
        box = [blocks["BLOCK_M"], blocks["BLOCK_K"]]
        spec = replace(spec, arguments={**spec.arguments, "x_ptr": f"tensordesc<{tile.dtype}{box}>"})
    parts = 2 if use.flags.get("INTERLEAVED") is False else 1
    along = "N" if use.transposed else "K"
    if not blocks.get("TMA") or (along == "N" and parts > 1):
        return replace(spec, constants={**constants, "TMA": ""})
    box = box_of(along, parts, blocks["BLOCK_N"], blocks["BLOCK_K"])
    return replace(
        spec,
        constants={**constants, "TMA": along},
        arguments={**spec.arguments, "w_ptr": f"tensordesc<{tile.dtype}{box}>"},
    )


def _share_of(use: Use) -> Use:
    """The use for a share of a quantized weight's experts, whose programs walk over its tiles."""
    return replace(use, label=f"{use.label}, a share", flags={**use.flags, "PERSISTENT": True})


def _is_for_shares(tile: Tile) -> bool:
    """True if the products of shares are compiled on a tile: where all uses are, unless its own programs walk, or it
    is for as few rows as are decoded where they are multiplied."""
    rule = tile.rule
    return (
        tile.every_use
        and tile.dtype == "bf16"
        and not rule.launch.get("PERSISTENT")
        and not rule.launch.get("LIBRARY")
        and rule.launch["BLOCK_M"] > 16
    )


def _uses(tile: Tile) -> tuple[Use, ...]:
    """Every use where a tile is compiled for all, on the rest the two that need most.

    float16 differs from bfloat16 in the name of the instruction alone, so the widest tile stands for it.
    """
    columns = tile.rule.largest("n")
    if columns is not None and columns <= 64:
        return _NARROW if tile.dtype != "fp16" else ()
    if tile.every_use and tile.dtype == "bf16":
        return (*_USES, *(map(_share_of, _LARGEST) if _is_for_shares(tile) else ()))
    return _LARGEST if tile.every_use or tile.dtype != "fp16" else ()


def _outer(weighted: bool, tile: Tile) -> CompileSpec:
    constants = {
        "GATHER_P": weighted,
        "GATHER_Q": not weighted,
        "TOP_K": 8,
        "WEIGHTED": weighted,
        "PRECISION": tile.precision,
        **tile.blocks(),
    }
    label = tile.label("d down" if weighted else "d gate/up", "PQS")
    return tile.spec(grouped_outer_kernel, label, constants)


def _specs() -> Iterator[CompileSpec]:
    for tile in tiles_of("grouped_matmul"):
        for use in _uses(tile):
            yield matmul_spec(grouped_matmul_kernel, use, tile)
    for tile in tiles_of("grouped_outer"):
        if tile.dtype != "fp16" or tile.every_use:
            for weighted in (False, True):
                yield _outer(weighted, tile)


COMPILE_SPECS = distinct(_specs())
