"""The bounds of a gated activation in float16."""

from __future__ import annotations

LARGEST = 65504.0
"""The largest float16: what a projection that overflowed is taken for."""

LIMIT = 65280.0
"""The bound of the product: far enough below the largest that no rounding on the way reaches infinity."""
