"""Tile tables: what a kernel is launched with, as data, looked up by device, kernel and sizes.

A table is a file ``tiles/<device>.json`` beside an operator; ``default.json`` fits every device. It maps a kernel's
name to rules, tried from the top. A rule holds for elements of ``bytes`` bytes; its ``launch`` has the block sizes,
``num_warps`` and ``num_stages``. Everything else in it is a limit: the largest value that it serves of the size of that
name, null for any, or ``true`` where it serves only what the name says. ``measured`` says on which GPU the rules were
timed, or is null where they are reasoned, not timed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .compile_spec import TARGETS

DEFAULT = "default"
DEVICES = tuple(sorted((*TARGETS, DEFAULT)))
"""Those with a table."""


@dataclass(frozen=True)
class Rule:
    """One line of a table: element size, limits by name (None: any), and what to launch with."""

    bytes: int
    limits: Mapping[str, int | None]
    launch: Mapping[str, int]

    def serves(self, itemsize: int, sizes: Mapping[str, float]) -> bool:
        """Tell whether the rule holds for elements of that many bytes and these sizes."""
        return self.bytes == itemsize and all(
            limit is None or (sizes[name] if limit is True else sizes[name] <= limit)
            for name, limit in self.limits.items()
        )


@dataclass(frozen=True)
class Table:
    """All rules for one device, by kernel, and where they were timed (None: nowhere)."""

    measured: Mapping[str, Any] | None
    rules: Mapping[str, tuple[Rule, ...]]


@functools.cache
def load(folder: Path, device: str) -> Table:
    """The table of one of the :data:`DEVICES` in an operator's folder."""
    content = json.loads((folder / f"{device}.json").read_text("utf-8"))
    measured = content.pop("measured")
    rules = {
        kernel: tuple(
            Rule(
                line.pop("bytes"), launch=MappingProxyType(line.pop("launch")), limits=MappingProxyType(line)
            )
            for line in lines
        )
        for kernel, lines in content.items()
    }
    return Table(measured, MappingProxyType(rules))


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


def find(
    folder: Path, device: str, kernel: str, dtype: torch.dtype, sizes: Mapping[str, float]
) -> Mapping[str, int]:
    """Block sizes and options to launch ``kernel`` with: those of the first rule that serves these sizes.

    Raises:
        NotImplementedError: No rule for elements of that size.
    """
    for rule in load(folder, device).rules[kernel]:
        if rule.serves(dtype.itemsize, sizes):
            return rule.launch
    raise NotImplementedError(f"{kernel}: no Triton kernel for {dtype}; use float32, bfloat16 or float16")
