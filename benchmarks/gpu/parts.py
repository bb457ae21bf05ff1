"""The parts of a model that the plan names, and the problems that they make."""

from __future__ import annotations

from collections.abc import Mapping

from gpu import dense_problems, pair_problems, problems
from gpu.problems import Part, Problem
from gpu.sweep_plan import Entry

PARTS: Mapping[str, Part] = {**problems.PARTS, **dense_problems.PARTS, **pair_problems.PARTS}


def make(entry: Entry, real: bool) -> Problem:
    """A problem of the plan on torch's default device, with values to compute with if ``real``."""
    return PARTS[entry.part](entry.sizes, real)
