"""Tile tables: what a kernel is launched with, as data, looked up by device, kernel and sizes.

A table is a file ``tiles/<device>.json`` beside an operator; ``default.json`` fits every device. It maps a kernel's
name to rules, tried from the top. A rule holds for elements of ``bytes`` bytes; its ``launch`` has the block sizes,
``num_warps``, ``num_stages`` and options of the kernel, which are off where they are not named. ``measured`` names the
timing that chose the launch, or is null where it was chosen by reasoning, without any. Everything else in a rule is a
limit on the size of that name: the largest that it serves, ``[least, most]``, null for any, or ``true`` or ``false``
where it serves only what the name says, or only the rest. The table's own ``measured`` says of each timing where and
when it was made, and in which file of the repository its figures are.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .compile_spec import TARGETS

DEFAULT = "default"
DEVICES = tuple(sorted((*TARGETS, DEFAULT)))
"""Those with a table."""

_MOST_LAUNCHES = 4096

Limit = int | tuple[int, int] | None


@dataclass(frozen=True)
class Rule:
    """One line of a table: element size, limits by name, what to launch with, and the timing that chose it, if any."""

    bytes: int
    limits: Mapping[str, Limit]
    launch: Mapping[str, int]
    measured: str | None = None

    def serves(self, itemsize: int, sizes: Mapping[str, float]) -> bool:
        """Tell whether the rule holds for elements of that many bytes and these sizes."""
        return self.bytes == itemsize and all(
            _within(sizes[name], limit) for name, limit in self.limits.items() if limit is not None
        )

    def largest(self, name: str) -> int | None:
        """The largest size of that name that the rule serves; None for any."""
        limit = self.limits[name]
        return limit[1] if isinstance(limit, tuple) else limit


def _within(size: float, limit: int | tuple[int, int]) -> bool:
    if isinstance(limit, tuple):
        return limit[0] <= size <= limit[1]
    return bool(size) is limit if isinstance(limit, bool) else size <= limit


@dataclass(frozen=True)
class Timing:
    """A timing of launches: the GPU's name, the date, the versions and the commit, and the file with the figures."""

    device: str
    date: str
    torch: str
    triton: str
    commit: str | None
    figures: str

    def __str__(self) -> str:
        return f"{self.device}, {self.date}"


@dataclass(frozen=True)
class Table:
    """All rules for one device, by kernel, and the timings that they name."""

    measured: Mapping[str, Timing]
    rules: Mapping[str, tuple[Rule, ...]]
    launches: dict[tuple[Any, ...], Mapping[str, int]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """What has been found so far, by kernel, element size and sizes."""

    def timing(self, rule: Rule) -> Timing | None:
        """The timing that chose a rule's launch; None where nothing was timed."""
        return None if rule.measured is None else self.measured[rule.measured]


@functools.cache
def load(folder: Path, device: str) -> Table:
    """The table of one of the :data:`DEVICES` in an operator's folder."""
    content = json.loads((folder / f"{device}.json").read_text("utf-8"))
    measured = {name: Timing(**timing) for name, timing in (content.pop("measured") or {}).items()}
    rules = {kernel: tuple(map(parse_rule, lines)) for kernel, lines in content.items()}
    return Table(MappingProxyType(measured), MappingProxyType(rules))


def parse_rule(line: Mapping[str, Any]) -> Rule:
    """A rule from a table's file."""
    limits = {
        name: tuple(limit) if isinstance(limit, list) else limit
        for name, limit in line.items()
        if name not in ("bytes", "launch", "measured")
    }
    launch = MappingProxyType(line["launch"])
    return Rule(line["bytes"], MappingProxyType(limits), launch, line.get("measured"))


def closest(backend: str, arch: str) -> str:
    """The device whose table serves an architecture.

    Args:
        backend: ``cuda``, ``hip`` or another.
        arch: ``80`` for compute capability 8.0, ``gfx942``.

    Returns:
        Its own, else that of the nearest older compute capability of the same generation, whose code it is meant to run
        well, else ``default``.
    """
    if backend == "hip" and arch in DEVICES:
        return arch
    if backend == "cuda":
        capabilities = [int(name.removeprefix("sm_")) for name in DEVICES if name.startswith("sm_")]
        older = max((own for own in capabilities if own <= int(arch)), default=0)
        if older and older // 10 == int(arch) // 10:
            return f"sm_{older}"
    return DEFAULT


@functools.cache
def table_of(device: torch.device) -> str:
    """The name of the table that serves a tensor's device."""
    if device.type != "cuda":
        return DEFAULT
    if torch.version.hip:
        return closest("hip", torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return closest("cuda", f"{major}{minor}")


def lookup(
    folder: Path, device: str, kernel: str, itemsize: int, sizes: Mapping[str, float]
) -> Mapping[str, int] | None:
    """The launch of the first rule that serves elements of that many bytes and these sizes; None where none does."""
    table = load(folder, device)
    key = (kernel, itemsize, *sizes.items())
    launch = table.launches.get(key)
    if launch is None:
        rules = table.rules.get(kernel, ())
        launch = next((rule.launch for rule in rules if rule.serves(itemsize, sizes)), None)
        # Of tokens there may be another number each time.
        if len(table.launches) >= _MOST_LAUNCHES:
            table.launches.clear()
        if launch is not None:
            table.launches[key] = launch
    return launch


def find(
    folder: Path, device: str, kernel: str, dtype: torch.dtype, sizes: Mapping[str, float]
) -> Mapping[str, int]:
    """Block sizes and options to launch ``kernel`` with: those of the first rule that serves these sizes.

    Raises:
        NotImplementedError: No rule for elements of that size.
    """
    launch = lookup(folder, device, kernel, dtype.itemsize, sizes)
    if launch is None:
        raise NotImplementedError(f"{kernel}: no Triton kernel for {dtype}; use float32, bfloat16 or float16")
    return launch
