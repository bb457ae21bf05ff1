"""Draws figures of a GPU as bars: time by implementation, and each launch's share of what the card could do at most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

OURS, OTHERS, FADED = "#1f77b4", "#b8b8b8", "#e6e6e6"
LEFT, WIDTH, BAR = 230, 420, 16


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its length in the figure's unit, the text behind it, and its colour."""

    name: str
    value: float
    text: str
    colour: str = OTHERS


def bars(title: str, groups: Mapping[str, Sequence[Bar]], most: float | None = None) -> str:
    """An SVG of horizontal bars in groups, each of which has a scale of its own unless all have ``most``.

    A bar of more than eight times the shortest is cut there, for the others to be seen.
    """
    y, parts = 28, [f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>']
    for name, members in groups.items():
        y += BAR
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(name)}</text>')
        values = [bar.value for bar in members]
        longest = most or min(max(values), 8 * min(values))
        for bar in members:
            length = max(1, round(WIDTH * min(bar.value / longest, 1.0)))
            parts += [
                f'<text x="{LEFT - 6}" y="{y + BAR}" text-anchor="end">{escape(bar.name)}</text>',
                f'<rect x="{LEFT}" y="{y + 5}" width="{length}" height="{BAR - 4}" fill="{bar.colour}"/>',
                f'<text x="{LEFT + length + 5}" y="{y + BAR}">{escape(bar.text)}</text>',
            ]
            y += BAR
        y += 8
    return svg(parts, y + 8)


def svg(parts: Iterable[str], height: int) -> str:
    """A picture of these elements on white."""
    size = f'width="{LEFT + WIDTH + 200}" height="{height}"'
    style = 'font-family="sans-serif" font-size="12"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{background}\n' + "\n".join(
        [*parts, "</svg>\n"]
    )


def curves(title: str, lines: Mapping[str, Sequence[float]]) -> str:
    """An SVG of lines over the same steps, the first in colour and on top, the others wide and grey behind it."""
    left, top, height = 60, 36, 180
    values = [value for line in lines.values() for value in line]
    low, high = min(values), max(values)
    steps = max(max(map(len, lines.values())) - 1, 1)
    parts = [f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>']
    for level in (low, high):
        y = top + height * (high - level) / ((high - low) or 1)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{level:.3g}</text>')
    for index, (name, line) in reversed(list(enumerate(lines.items()))):
        points = " ".join(
            f"{left + WIDTH * step / steps:.1f},{top + height * (high - value) / ((high - low) or 1):.1f}"
            for step, value in enumerate(line)
        )
        colour, width = (OTHERS, 5) if index else (OURS, 1.5)
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>',
            f'<text x="{left + WIDTH + 10}" y="{top + 14 + 16 * index}" fill="{"#666666" if index else OURS}">'
            f"{escape(name)}</text>",
        ]
    parts.append(f'<text x="{left}" y="{top + height + 18}">{steps + 1} steps</text>')
    return svg(parts, top + height + 28)


def is_disturbed(row: Mapping[str, Any]) -> bool:
    """Tell whether a row says that something else used the card."""
    return bool(row.get("disturbed"))


def best_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """By layer, each implementation's fastest row: undisturbed if there is one. The fastest implementation first."""
    chosen: dict[tuple[str, str], Mapping[str, Any]] = {}
    timed = (row for row in rows if "ms" in row)
    for row in sorted(timed, key=lambda row: (is_disturbed(row), row["ms"])):
        chosen.setdefault((row["layer"], row["implementation"]), row)
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(chosen.values(), key=lambda row: row["ms"]):
        layers.setdefault(row["layer"], []).append(row)
    return layers


def time_by_implementation(rows: Iterable[Mapping[str, Any]], title: str) -> str:
    """Bars of milliseconds by layer, ours in colour, disturbed rows faded."""

    def bar(row: Mapping[str, Any]) -> Bar:
        colour = OURS if row["implementation"] == "scattermoe" else OTHERS
        disturbed = is_disturbed(row)
        text = f"{row['ms']:.3g} ms{' (disturbed)' if disturbed else ''}"
        return Bar(row["implementation"], row["ms"], text, FADED if disturbed and colour != OURS else colour)

    return bars(title, {layer: [bar(row) for row in members] for layer, members in best_rows(rows).items()})


def floor_ms(problem: Mapping[str, Any], dense_tflops: float, copy_gb_per_s: float) -> tuple[float, str]:
    """The least milliseconds that the card can take for a problem, and what binds: ``dense`` or ``copy``."""
    dense, copy = problem["gflop"] / dense_tflops, problem["mb"] / copy_gb_per_s
    return (dense, "dense") if dense >= copy else (copy, "copy")


def share_of_roof(sweep: Mapping[str, Any], title: str) -> str:
    """Bars of each problem's launches, fastest first: the floor over the time; the launch that ships in colour."""
    groups = {}
    for name, problem in sweep["problems"].items():
        floor, binds = floor_ms(problem, sweep["dense_tflops"], sweep["copy_gb_per_s"])
        timed = sorted(
            (entry for entry in problem["launches"] if entry["ms"] is not None), key=lambda e: e["ms"]
        )
        if timed:
            groups[f"{name} ({binds})"] = [
                Bar(
                    " ".join(str(value) for option, value in entry["launch"].items() if option != "GROUP_M"),
                    floor / entry["ms"],
                    f"{floor / entry['ms']:.0%}, {entry['ms']:.3g} ms",
                    OTHERS if rank else OURS,
                )
                for rank, entry in enumerate(timed[:5])
            ]
    return bars(title, groups, most=1.0)


def draw(folder: Path, rows: Iterable[Mapping[str, Any]], sweep: Mapping[str, Any] | None, of: str) -> None:
    """Write ``time.svg`` and, where there is a sweep, ``roof.svg`` into a folder; ``of`` names card and date."""
    rows = list(rows)
    if any("ms" in row for row in rows):
        title = f"Forward and backward, {of}"
        folder.joinpath("time.svg").write_text(time_by_implementation(rows, title))
    if sweep and any(problem["launches"] for problem in sweep["problems"].values()):
        title = f"Launches' share of the roof (five fastest), {of}"
        folder.joinpath("roof.svg").write_text(share_of_roof(sweep, title))
