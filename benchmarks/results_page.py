"""Writes docs/results.md, its pictures, and the card's figures from what benchmarks/results holds.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gpu import latest
from gpu.report import sweep_table, table
from pictures import OTHERS, Bar, bars, best_rows, curves, is_disturbed, share_of_roof, time_by_implementation
from pictures import OURS as OURS_COLOUR

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
PAGE = Path("docs/results.md")
CARD = Path("CARD.md")
OURS = "scattermoe"
RECIPE_KEYS = ("recipe", "command", "device", "losses", "ms_per_step", "peak_bytes", "planned_bytes")
# Pictures that lie beside the figures; of other files bars are drawn.
DRAWN = {"cpu-growth.json": "cpu-growth.png", "loss-memory.json": "loss-memory.svg"}
CARD_FIGURES = re.compile(
    r"(?<=\{# figures: python benchmarks/results_page.py #\}\n).*?(?=\{# end #\})", re.DOTALL
)
GPU = "On a GPU"
# Headings of the page, and the files below benchmarks/results that they show. A file is under the first that fits.
SECTIONS = {
    "Recipes": ("recipes/*", "*/recipes/*"),
    GPU: ("*/report.json",),
    "Launches on a GPU": ("*/sweep.json",),
    "Quantization": ("*quantized*",),
    "Attention": ("*attention*",),
    "Experts": ("cpu-growth.json", "*experts*"),
    "Norms and rotary embedding": ("*norm*",),
    "Loss, MLPs and projections": ("*loss*", "*mlp*", "*projections*"),
}


def read(root: Path) -> dict[str, dict[str, Any]]:
    """Every file of results by its path below benchmarks/results.

    Raises:
        SystemExit: One is no JSON, or no section shows it.
    """
    contents = {}
    for path in sorted(root.joinpath(RESULTS).rglob("*.json")):
        name = path.relative_to(root / RESULTS).as_posix()
        if not any(fnmatch(name, pattern) for patterns in SECTIONS.values() for pattern in patterns):
            sys.exit(f"error: {RESULTS / name}: no section of {PAGE} shows it; add its name to SECTIONS")
        try:
            contents[name] = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            sys.exit(f"error: {RESULTS / name}: no JSON: {error}")
        missing = {"date", "commit", "versions"} - contents[name].keys()
        if "recipes/" in name:
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
    return [*text, f"Refused: {', '.join(refused)}.", ""] if refused else text


def recipe_rows(contents: Iterable[Mapping[str, Any]]) -> list[str]:
    """A table of all recipes: loss, time and memory, ours and, where it was run, eager."""
    lines = []
    for content in contents:
        losses = content["losses"]
        apart = [abs(a - b) for a, b in zip(losses.get("ours", ()), losses.get("eager", ()), strict=False)]
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
        if content[key]
    }
    return bars(f"{key.replace('_', ' ')}, {unit}", groups)


def picture(name: str, content: Mapping[str, Any]) -> str | None:
    """An SVG of a file's figures; None where there is one beside it, or nothing to draw."""
    if name in DRAWN:
        return None
    title = f"{Path(name).stem}, {content['date'][:10]}"
    if "losses" in content:
        return curves(f"Loss, {title}", content["losses"]) if content["losses"] else None
    if "problems" in content:
        return share_of_roof(content, f"Launches' share of the roof (five fastest), {content['device']}")
    rows = list(rows_of(content))
    return (
        time_by_implementation(rows, f"Milliseconds, {title}") if any("ms" in row for row in rows) else None
    )


def by_newest(names: Iterable[str], contents: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The newest file of each device and file name, with those before it, by date."""
    groups: dict[tuple[object, str], list[str]] = {}
    for name in sorted(names, key=lambda name: (contents[name]["date"][:10], name), reverse=True):
        groups.setdefault((contents[name].get("device"), Path(name).name), []).append(name)
    return {newest: earlier for newest, *earlier in groups.values()}


def drawing_path(name: str) -> Path:
    """The path of a file's picture; the same for all runs on a device, for other pages to show the newest."""
    device, *rest = name.removesuffix(".json").split("/")
    return PAGE.with_suffix("") / f"{'-'.join([device, *rest[-1:]])}.svg"


def gpu_runs(contents: Mapping[str, Mapping[str, Any]], files: dict[Path, str]) -> list[str]:
    """What ``make gpu`` found on each device; the pictures go into ``files``."""
    lines: list[str] = [
        "`make gpu` ([how](kernel/triton.md#on-a-gpu)), of each layer the rows of the newest run that timed ours. All",
        "are forward and backward, with the launches that shipped at the run's commit, or where none was timed so with",
        "those that its sweep found. *Of ours* is a time over ours, *MB above* the peak of memory above weights and",
        "inputs, *of dense* the share of the card's dense rate. A row that is disturbed was timed while the card was",
        "slower than it is when idle.",
        "",
    ]
    for device, runs in latest.runs_by_device(contents).items():
        lines += [f"### {device}", "", *latest.overview(runs, f"../{RESULTS.as_posix()}")]
        lines += ["#### Beside the fastest other", "", *latest.beside_fastest(runs, latest.LAYERS)]
        for kind, title, rows, svg in latest.sections(runs):
            lines += [f"#### {title}", ""]
            if svg:
                path = drawing_path(f"{runs[0].folder.split('/')[0]}/{kind}.json")
                files[path] = svg
                lines += [f"![{title}](results/{path.name})", ""]
            lines += rows
        lines += latest.others(runs)
    return lines


def one_file(name: str, content: Mapping[str, Any], files: dict[Path, str]) -> list[str]:
    """A file with its table; a picture that is drawn for it goes into ``files``."""
    address = f"../{(RESULTS / name).as_posix()}"
    lines = [f"### {name}", "", f"[{Path(name).name}]({address}): {provenance(content)}", ""]
    lines += [f"{content[key]}\n" for key in ("about", "warning") if content.get(key)]
    lines += [f"`{content['command']}`\n"] if "command" in content else []
    drawing = picture(name, content)
    if drawing is not None:
        path = drawing_path(name)
        files[path] = drawing
        lines += [f"![Figures of {name}](results/{path.name})", ""]
    elif name in DRAWN:
        lines += [f"![Figures of {name}](../{(RESULTS / DRAWN[name]).as_posix()})", ""]
    if "problems" in content:
        return [*lines, *sweep_table(content)]
    return [*lines, *measured(content)] if any(rows_of(content)) else lines


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
    for title, patterns in SECTIONS.items():
        own = {
            name: content
            for name, content in contents.items()
            if name not in shown and any(fnmatch(name, pattern) for pattern in patterns)
        }
        if not own:
            continue
        shown |= own.keys()
        lines += [f"## {title}", ""]
        if title == GPU:
            lines += gpu_runs(own, files)
            continue
        newest = by_newest(own, contents)
        if title == "Recipes":
            figures = [content for name, content in own.items() if name in newest]
            lines += recipe_rows(figures)
            for key, unit, scale in (("ms_per_step", "ms", 1), ("peak_bytes", "MB", 1e-6)):
                path = PAGE.with_suffix("") / f"recipes-{unit}.svg"
                files[path] = recipe_bars(figures, key, unit, scale)
                lines += [f"![{unit} of each recipe](results/{path.name})", ""]
        for name in [name for name in own if name in newest]:
            lines += one_file(name, own[name], files)
            addresses = [f"[{other}](../{(RESULTS / other).as_posix()})" for other in newest[name]]
            lines += [f"Earlier: {', '.join(addresses)}.", ""] if addresses else []
    return files | {PAGE: "\n".join(lines).rstrip() + "\n"}


def card_figures(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of whole layers on a GPU, ours beside the fastest other, for the card."""
    lines = [
        line
        for runs in latest.runs_by_device(contents).values()
        for line in latest.beside_fastest(runs, latest.CARD)
    ]
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
