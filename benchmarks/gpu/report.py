"""What a run found, as one JSON, and as a page with pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pictures
from measuring import replace


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write ``report.json``, ``sweep.json``, ``report.md`` and the pictures into a folder, each at once.

    Args:
        results: ``device``, ``date``, ``commit``, ``versions``, ``card``, ``minutes`` and ``stages``, and as far as the
            run came ``tests``, ``rows``, ``model``, ``sweep`` (problems by name), ``rows_with_new_tables`` and
            ``sanitizer``.
    """
    of = f"{results['device']}, {results['date'][:10]}"
    sweep = sweep_file(results) if results.get("sweep") else None
    replace(folder / "report.json", json.dumps({**results, "sweep": None}, indent=2) + "\n")
    if sweep:
        replace(folder / "sweep.json", json.dumps(sweep, indent=1) + "\n")
    pictures.draw(folder, results.get("rows_with_new_tables") or results.get("rows") or [], sweep, of)
    drawn = [name for name in ("time.svg", "roof.svg") if folder.joinpath(name).exists()]
    replace(folder / "report.md", page(results, sweep, drawn))


def sweep_file(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a sweep as a file that tile tables name."""
    card = {key: results["card"][key] for key in ("dense_tflops", "copy_gb_per_s")}
    about = {key: results[key] for key in ("commit", "device", "versions")}
    return {"date": results["date"][:10], **about, "dtype": "bfloat16", **card, "problems": results["sweep"]}


def page(results: Mapping[str, Any], sweep: Mapping[str, Any] | None, drawn: Sequence[str]) -> str:
    """The page."""
    card = results["card"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    lines = [
        f"# {results['device']}, {results['date'][:16].replace('T', ' ')}",
        "",
        f"`make gpu` of {results['minutes']:g} minutes at commit {results['commit']}; {versions}. The idle card's "
        f"dense bfloat16 rate is {card['dense_tflops']:.0f} TFLOP/s, it copies {card['copy_gb_per_s']:.0f} GB/s.",
        "",
        *table(
            ("stage", "seconds", "outcome"),
            [
                (name, f"{stage['seconds']:.0f}", stage["outcome"])
                for name, stage in results["stages"].items()
            ],
        ),
    ]
    if tests := results.get("tests"):
        lines += [f"Tests: {tests['passed']} passed, {tests['failed']} failed ({tests['outcome']}).", ""]
        lines += [f"- {name}" for name in tests["failures"]] + [""]
    for key, title in (
        ("rows", "Rows, with the tables that ship"),
        ("rows_with_new_tables", "Rows, with this sweep's tables"),
    ):
        if results.get(key):
            lines += [f"## {title}", "", *rows_table(results[key], card["dense_tflops"])]
    if results.get("model"):
        lines += ["## Steps of Gemma 4 26B-A4B, random weights", "", *model_table(results["model"])]
    if "time.svg" in drawn:
        lines += ["![Time by implementation](time.svg)", ""]
    if sweep:
        lines += ["## Launches", "", *sweep_table(sweep)]
    if "roof.svg" in drawn:
        lines += ["![Each launch's share of the roof](roof.svg)", ""]
    if checks := results.get("sanitizer"):
        lines += [
            "## compute-sanitizer",
            "",
            *(f"- {name}: {outcome}" for name, outcome in checks.items()),
            "",
        ]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines, and an empty one."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]


def rows_table(rows: Sequence[Mapping[str, Any]], dense_tflops: float) -> list[str]:
    """The rows by layer, the fastest first, with the factor between ours and each; and then what was refused."""
    lines = []
    for layer, members in pictures.best_rows(rows).items():
        ours = next((row["ms"] for row in members if row["implementation"] == "scattermoe"), None)
        for row in members:
            ratio = f"{row['ms'] / ours:.2f}" if ours else ""
            share = f"{row['tflops'] / dense_tflops:.0%}" if "tflops" in row else ""
            disturbed = "disturbed" if pictures.is_disturbed(row) else ""
            name, ms, peak = row["implementation"], f"{row['ms']:.3g}", f"{row['peak_mb']:.0f}"
            lines.append((layer, name, ms, ratio, peak, share, disturbed))
    header = ("layer", "implementation", "ms", "of ours", "MB above", "of dense", "")
    refused = [row for row in rows if "refused" in row]
    told = [f"- {row['layer']}, {row['implementation']}: {row['refused']}" for row in refused]
    return [*(table(header, lines) if lines else []), *told, *([""] if told else [])]


def model_table(model: Mapping[str, Any]) -> list[str]:
    """The steps of a whole model by job and implementation, and what else their files say."""
    lines = [
        (job, name, f"{ms:.0f}", f"{run['peak_bytes'][name] / 1e9:.1f}", f"{run['planned_bytes'] / 1e9:.1f}")
        for job, run in model.items()
        for name, ms in run.get("ms_per_step", {}).items()
    ]
    told = [f"- {job}, {run['outcome']}: {run.get('about', 'no figures')}" for job, run in model.items()]
    return [*table(("steps", "implementation", "ms a step", "GB", "GB planned, ours"), lines), *told, ""]


def sweep_table(sweep: Mapping[str, Any]) -> list[str]:
    """For each problem the launch that shipped, the fastest, and what share of the roof that is."""
    lines = []
    for name, problem in sweep["problems"].items():
        floor, binds = pictures.floor_ms(problem, sweep["dense_tflops"], sweep["copy_gb_per_s"])
        timed = [entry for entry in problem["launches"] if entry["ms"] is not None]
        shipped = next((f"{entry['ms']:.4g}" for entry in timed if entry.get("ships")), "")
        best = min(timed, key=lambda entry: entry["ms"], default=None)
        if best is None:
            lines.append((name, shipped, "", "", "", ""))
            continue
        launch = ", ".join(f"{option} {value}" for option, value in best["launch"].items())
        share = f"{floor / best['ms']:.0%}"
        lines.append((name, shipped, f"{best['ms']:.4g}", launch, share, binds))
    return table(("problem", "ms as shipped", "ms", "with", "of the roof", "which is"), lines)
