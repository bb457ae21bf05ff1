"""Division of the minutes over the stages."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Budget:
    """Gives each stage its share of the time that is left, so that what one leaves over serves those after it.

    Times are those of ``time.monotonic()``, which all processes of a machine have in common.

    Args:
        minutes: For all stages together.
        shares: The stages' weights by name, in the order in which they run.
    """

    def __init__(self, minutes: float, shares: Mapping[str, float]) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.shares = dict(shares)

    def until(self, stage: str) -> float:
        """The time at which a stage that begins now has to end. Stages are asked for in their order."""
        names = list(self.shares)
        left = sum(self.shares[name] for name in names[names.index(stage) :])
        now = time.monotonic()
        return now + max(self.end - now, 0.0) * self.shares[stage] / left
