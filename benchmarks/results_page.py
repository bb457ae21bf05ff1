"""Writes docs/results.md, its pictures, and the card's figures from what benchmarks/results holds.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pictures import OTHERS, Bar, bars, best_rows, curves, floor_ms, is_disturbed, time_by_implementation
from pictures import OURS as OURS_COLOUR

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
PAGE = Path("docs/results.md")
CARD = Path("CARD.md")
OURS = "scattermoe"
RECIPE_KEYS = ("recipe", "command", "device", "losses", "ms_per_step", "peak_bytes", "planned_bytes")
# Pictures that lie beside the figures; of other files bars are drawn.
DRAWN = {
    "cpu-growth.json": "cpu-growth.png",
    "h100/rows.json": "h100/time.svg",
    "h100/sweep.json": "h100/roof.svg",
    "loss-memory.json": "loss-memory.svg",
}
CARD_FIGURES = re.compile(
    r"(?<=\{# figures: python benchmarks/results_page.py #\}\n).*?(?=\{# end #\})", re.DOTALL
)


@dataclass(frozen=True)
class Section:
    """A heading of the page, the files below benchmarks/results that it shows, and what makes another."""

    title: str
    files: tuple[str, ...]
    command: str


SECTIONS = (
    Section("Recipes", ("recipes/*",), "recipes/measure.py RECIPE"),
    Section("Quantization", ("*quantized*",), "benchmarks/compare_quantized.py"),
    Section("Attention", ("*attention*",), "benchmarks/compare_attention.py"),
    Section("Experts", ("cpu-growth.json", "*experts*", "*/rows.json"), "benchmarks/compare.py"),
    Section("Norms and rotary embedding", ("*norm*",), "benchmarks/benchmark_norm_rotary.py"),
    Section("Loss, MLPs and projections", ("*loss*", "*mlp*", "*projections*"), "benchmarks/compare_loss.py"),
    Section("Launches on a GPU", ("*/sweep.json",), "benchmarks/gpu"),
)


def read(root: Path) -> dict[str, dict[str, Any]]:
    """Every file of results by its path below benchmarks/results.

    Raises:
        SystemExit: One is no JSON, or no section shows it.
    """
    contents = {}
    for path in sorted(root.joinpath(RESULTS).rglob("*.json")):
        name = path.relative_to(root / RESULTS).as_posix()
        if not any(fnmatch(name, pattern) for section in SECTIONS for pattern in section.files):
            sys.exit(f"error: {RESULTS / name}: no section of {PAGE} shows it; add its name to SECTIONS")
        try:
            contents[name] = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            sys.exit(f"error: {RESULTS / name}: no JSON: {error}")
        missing = {"date", "commit", "versions"} - contents[name].keys()
        if name.startswith("recipes/"):
            missing |= set(RECIPE_KEYS) - contents[name].keys()
        if missing:
            sys.exit(f"error: {RESULTS / name}: without {', '.join(sorted(missing))}")
    return contents


def rows_of(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The measurements of a file, whatever its form: layer, implementation, and ``ms`` or why it was refused."""
    yield from content.get("rows") or _nested(content.get("results", {}))


def _nested(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for case, implementations in results.items():
        for implementation, found in implementations.items():
            for row in found if isinstance(found, list) else [found]:
                if not isinstance(row, Mapping):
                    continue
                size = f" {row[case]}" if case in row else ""
                milliseconds = row.get("ms", row.get("step_ms"))
                yield {
                    **row,
                    "layer": f"{case}{size}",
                    "implementation": implementation,
                    **({} if milliseconds is None else {"ms": milliseconds}),
                }


def provenance(content: Mapping[str, Any]) -> str:
    """When, on what, with what and from which commit the figures are."""
    devices = sorted({row["device"] for row in rows_of(content) if "device" in row})
    device = content.get("device") or ", ".join(devices) or "a device that the file does not name"
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
    return f"{content['date'][:10]}, {device}; {versions}; commit {content['commit'] or 'unknown'}."


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """A table in Markdown."""
    header = list(header)
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def measured(content: Mapping[str, Any]) -> list[str]:
    """A table of each implementation's fastest run, the layers in the file's order."""
    rows = list(rows_of(content))
    layers = best_rows(rows)
    memory = next((key for row in rows for key in row if key.startswith("peak_")), "peak_mb")
    scale = 1e-6 if "_bytes" in memory else 1.0
    lines = [
        (
            layer,
            f"**{row['implementation']}**" if row["implementation"] == OURS else row["implementation"],
            _number(row["ms"]) + (" (disturbed)" if is_disturbed(row) else ""),
            _number(scale * row[memory]) if memory in row else "",
        )
        for layer in dict.fromkeys(row["layer"] for row in rows)
        for row in layers.get(layer, ())
    ]
    words = re.sub("_bytes|_mb", "", memory).replace("_", " ")
    refused = [f"{row['implementation']} on {row['layer']}" for row in rows if "refused" in row]
    text = table(("layer", "implementation", "ms", f"{words}, MB"), lines)
    return [*text, "", f"Refused: {', '.join(refused)}."] if refused else text


def launches(content: Mapping[str, Any]) -> list[str]:
    """A table of the fastest launch of each kernel, and its share of what the card can do at most."""
    lines = []
    for name, problem in content["problems"].items():
        times = [launch["ms"] for launch in problem["launches"] if launch["ms"] is not None]
        if times:
            floor, binds = floor_ms(problem, content["dense_tflops"], content["copy_gb_per_s"])
            library = problem.get("grouped_mm_ms")
            lines.append(
                (
                    name,
                    len(times),
                    _number(min(times)),
                    f"{floor / min(times):.0%} of {binds}",
                    _number(library),
                )
            )
    return table(("kernel", "launches", "fastest, ms", "share of the roof", "torch's grouped_mm, ms"), lines)


def recipe_rows(contents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of all recipes: loss, time and memory, ours and, where it was run, eager."""
    lines = []
    for content in contents.values():
        losses = content["losses"]
        apart = [abs(a - b) for a, b in zip(losses["ours"], losses.get("eager", ()), strict=False)]
        planned = content["planned_bytes"]
        lines.append(
            (
                content["recipe"],
                content["device"],
                "; ".join(f"{curve[0]:.3f} to {curve[-1]:.3f}" for curve in losses.values()),
                f"{max(apart):.1e}" if apart else "",
                "; ".join(map(_number, content["ms_per_step"].values())),
                "; ".join(_number(size / 1e6) for size in content["peak_bytes"].values()),
                "not planned" if planned is None else _number(planned / 1e6),
            )
        )
    header = (
        "recipe",
        "device",
        "loss: ours; eager",
        "largest difference",
        "ms a step",
        "memory, MB",
        "planned, MB",
    )
    return table(header, lines)


def recipe_bars(contents: Iterable[Mapping[str, Any]], key: str, unit: str, scale: float) -> str:
    """Bars of a measure of each recipe, ours in colour."""
    groups = {
        content["recipe"]: [
            Bar(
                name,
                scale * value,
                f"{_number(scale * value)} {unit}",
                OURS_COLOUR if name == "ours" else OTHERS,
            )
            for name, value in content[key].items()
        ]
        for content in contents
    }
    return bars(f"{key.replace('_', ' ')}, {unit}", groups)


def picture(name: str, content: Mapping[str, Any]) -> str | None:
    """An SVG of a file's figures; None where there is one beside it, or nothing to draw."""
    if name in DRAWN:
        return None
    title = f"{Path(name).stem}, {content['date'][:10]}"
    if "losses" in content:
        return curves(f"Loss, {title}", content["losses"])
    rows = list(rows_of(content))
    return (
        time_by_implementation(rows, f"Milliseconds, {title}") if any("ms" in row for row in rows) else None
    )


def render(contents: Mapping[str, Mapping[str, Any]]) -> dict[Path, str]:
    """The page and its pictures, by their paths in the repository."""
    lines = [
        "# Results",
        "",
        "All that `benchmarks/results/` holds: `python benchmarks/results_page.py` writes this page, its pictures and",
        "the figures on the card. What the numbers mean is on the kernels' own pages; this one says when, on what and",
        "with what they were measured.",
        "",
    ]
    files: dict[Path, str] = {}
    shown: set[str] = set()
    for section in SECTIONS:
        own = {
            name: content
            for name, content in contents.items()
            if name not in shown and any(fnmatch(name, pattern) for pattern in section.files)
        }
        shown |= own.keys()
        lines += [f"## {section.title}", ""]
        if not own:
            lines += [f"No file yet; `python {section.command}` with `--output` makes one.", ""]
        if section.title == "Recipes" and own:
            lines += [*recipe_rows(own), ""]
            for key, unit, scale in (("ms_per_step", "ms", 1), ("peak_bytes", "MB", 1e-6)):
                path = PAGE.with_suffix("") / f"recipes-{unit}.svg"
                files[path] = recipe_bars(own.values(), key, unit, scale)
                lines += [f"![{unit} of each recipe](results/{path.name})", ""]
        for name, content in own.items():
            address = f"../{(RESULTS / name).as_posix()}"
            lines += [f"### {name}", "", f"[{Path(name).name}]({address}): {provenance(content)}", ""]
            lines += [f"{content[key]}\n" for key in ("about", "warning") if key in content]
            lines += [f"`{content['command']}`\n"] if "command" in content else []
            drawing = picture(name, content)
            if drawing is not None:
                path = PAGE.with_suffix("") / f"{name.removesuffix('.json').replace('/', '-')}.svg"
                files[path] = drawing
                lines += [f"![Figures of {name}]({path.relative_to(PAGE.parent).as_posix()})", ""]
            elif name in DRAWN:
                lines += [f"![Figures of {name}](../{(RESULTS / DRAWN[name]).as_posix()})", ""]
            if "problems" in content:
                lines += [*launches(content), ""]
            elif any(rows_of(content)):
                lines += [*measured(content), ""]
    return files | {PAGE: "\n".join(lines).rstrip() + "\n"}


def card_figures(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of whole layers on a GPU, ours beside the fastest other, for the card."""
    lines: list[str] = []
    for name in ("h100/rows.json", "h100/attention.json"):
        content = contents[name]
        layers = best_rows(rows_of(content))
        compared = [
            (layer, f"{_number(own['ms'])} ms", f"{_number(other['ms'])} ms ({other['implementation']})")
            for layer, members in layers.items()
            for own in members
            if own["implementation"] == OURS
            for other in [row for row in members if row is not own][:1]
        ]
        text = [content[key] for key in ("about", "warning") if key in content]
        lines += [*text, "", *table(("layer", OURS, "fastest other"), compared), "", provenance(content), ""]
    content = contents["cpu-growth.json"]
    lines += [
        f"![One layer's time and memory on a CPU]({RESULTS / DRAWN['cpu-growth.json']})",
        "",
        provenance(content),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    contents = read(REPOSITORY)
    card = REPOSITORY.joinpath(CARD).read_text("utf-8")
    files = render(contents) | {CARD: CARD_FIGURES.sub(lambda _: card_figures(contents), card)}
    for path in REPOSITORY.joinpath(PAGE.with_suffix("")).glob("*.svg"):
        path.unlink()
    for path, text in files.items():
        REPOSITORY.joinpath(path).parent.mkdir(exist_ok=True)
        REPOSITORY.joinpath(path).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
