"""Tile configurations: data in ``grouped_linear/tiles/<device>.json``, looked up by device, kernel and shape.

A file maps a kernel's name to rules, tried from the top. A rule holds for elements of ``bytes`` bytes and, where they
are not null, at most that many ``rows`` an expert and sizes ``n`` and ``k`` (see :func:`launch`); its ``launch`` is
what the kernel is launched with. ``measured`` says on which GPU the rules were timed, or is null where they are
reasoned, not timed.
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

TILES = Path(__file__).parent / "grouped_linear" / "tiles"
DEFAULT = "default"


@dataclass(frozen=True)
class Rule:
    """One line of a table: the shapes it serves (None: any) and the launch's parameters."""

    bytes: int
    rows: int | None
    n: int | None
    k: int | None
    launch: Mapping[str, int]

    def serves(self, itemsize: int, rows: float, n: int, k: int) -> bool:
        """Whether the rule holds for a product of that element size and shape."""
        return (
            self.bytes == itemsize
            and (self.rows is None or rows <= self.rows)
            and (self.n is None or n <= self.n)
            and (self.k is None or k <= self.k)
        )


@dataclass(frozen=True)
class Table:
    """All rules for one device, by kernel, and where they were timed (None: nowhere)."""

    measured: Mapping[str, Any] | None
    rules: Mapping[str, tuple[Rule, ...]]


@functools.cache
def available() -> tuple[str, ...]:
    """The devices that have a table, ``default`` among them."""
    return tuple(sorted(path.stem for path in TILES.glob("*.json")))


@functools.cache
def load(device: str) -> Table:
    """The table of one of the :func:`available` devices."""
    content = json.loads((TILES / f"{device}.json").read_text("utf-8"))
    measured = content.pop("measured")
    rules = {
        kernel: tuple(Rule(**{**line, "launch": MappingProxyType(line["launch"])}) for line in lines)
        for kernel, lines in content.items()
    }
    return Table(measured, MappingProxyType(rules))


def closest(backend: str, arch: str) -> str:
    """The table for an architecture.

    Args:
        backend: ``cuda``, ``hip`` or another.
        arch: ``80`` for compute capability 8.0, ``gfx942``.

    Returns:
        Its own, else that of the nearest older compute capability of the same generation, whose code it is meant to run
        well, else ``default``.
    """
    if backend == "hip" and arch in available():
        return arch
    if backend == "cuda":
        older = [
            int(name.removeprefix("sm_"))
            for name in available()
            if name.startswith("sm_") and int(name.removeprefix("sm_")) <= int(arch)
        ]
        if older and max(older) // 10 == int(arch) // 10:
            return f"sm_{max(older)}"
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


def launch(kernel: str, like: torch.Tensor, rows: float, n: int, k: int) -> Mapping[str, int]:
    """What to launch ``kernel`` with: block sizes, ``num_warps``, ``num_stages``.

    Args:
        kernel: A kernel that every table knows.
        like: An operand; its device and element size count.
        rows: Rows an expert, on average.
        n, k: The other two sizes: ``[rows, k] x [k, n]`` for ``grouped_matmul``, ``[k, rows] x [rows, n]`` for
            ``grouped_outer``.

    Raises:
        NotImplementedError: No rule for elements of that size.
    """
    # Rows that do not start at a multiple of 16 elements are read one element at a time, and a large tile then runs
    # out of registers. A narrow matrix is small whatever its rows.
    is_aligned = all(size % 16 == 0 or size <= 64 for size in (n, k))
    for rule in load(table_of(like.device) if is_aligned else DEFAULT).rules[kernel]:
        if rule.serves(like.itemsize, rows, n, k):
            return rule.launch
    raise NotImplementedError(
        f"{kernel}: no Triton kernel for {like.dtype}; use float32, bfloat16 or float16"
    )
