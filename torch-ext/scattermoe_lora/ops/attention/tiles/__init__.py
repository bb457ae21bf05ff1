"""Tile configurations of attention: data in ``<device>.json`` beside this module, by device.

A file maps a kernel's name to rules, tried from the top. A rule holds for elements of ``bytes`` bytes and heads of at
most ``head_dim``; one that says ``"same_kv": true`` only where the keys are the values. ``launch`` is what the kernel
is launched with: block sizes, ``CHUNK`` (columns of the head that are multiplied at a time; the whole head where it is
as large), ``num_warps`` and ``num_stages``. ``measured`` says on which GPU the rules were timed, or is null where they
are reasoned, not timed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from ... import tile_tables

TILES = Path(__file__).parent


@dataclass(frozen=True)
class Rule:
    """One line of a table: what it serves and the launch's parameters."""

    bytes: int
    head_dim: int
    launch: Mapping[str, int]
    same_kv: bool = False


@functools.cache
def load(device: str) -> Mapping[str, tuple[Rule, ...]]:
    """The rules of one of the :func:`scattermoe_lora.ops.tiles.available` devices, by kernel."""
    content = json.loads((TILES / f"{device}.json").read_text("utf-8"))
    content.pop("measured")
    return MappingProxyType(
        {
            kernel: tuple(Rule(**{**line, "launch": MappingProxyType(line["launch"])}) for line in lines)
            for kernel, lines in content.items()
        }
    )


def launch(kernel: str, like: torch.Tensor, head_dim: int, same_kv: bool) -> Mapping[str, int]:
    """What to launch ``kernel`` with.

    Args:
        kernel: ``forward``, ``dkdv`` or ``dq``.
        like: An operand; its device and element size count.
        head_dim: Size of a head, at most 512.
        same_kv: Whether the keys are the values.

    Raises:
        NotImplementedError: No rule for elements of that size.
    """
    for rule in load(tile_tables.table_of(like.device))[kernel]:
        if rule.bytes == like.itemsize and head_dim <= rule.head_dim and (same_kv or not rule.same_kv):
            return rule.launch
    raise NotImplementedError(
        f"attention: no Triton kernel for {like.dtype}; use float32, bfloat16 or float16"
    )
