"""Draws how time and memory grow with tokens and with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PANELS = (
    ("ms", 1.0, "forward and backward, ms"),
    ("peak_bytes_above_weights", 1e-6, "peak above weights, MB"),
)


def draw(grown: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Write a PNG with a column for each dimension and a row for each measure, both axes logarithmic.

    Args:
        grown: ``{dimension: {implementation: [row, ...]}}``; a row holds the dimension's size, ``ms`` and
            ``peak_bytes_above_weights``.
        path: Where to write.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(len(PANELS), len(grown), squeeze=False)
    for column, (dimension, implementations) in enumerate(grown.items()):
        for row, (measure, scale, label) in enumerate(PANELS):
            axis = axes[row][column]
            for implementation, rows in implementations.items():
                sizes = [row[dimension] for row in rows]
                axis.loglog(sizes, [scale * row[measure] for row in rows], marker="o", label=implementation)
            axis.set(xlabel=dimension, ylabel=label, xticks=sizes, xticklabels=[str(size) for size in sizes])
            axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(path, format="png", dpi=120)
