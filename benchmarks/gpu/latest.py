"""All runs of ``make gpu`` on a device as one: of each layer the newest rows, as Markdown and as pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pictures import best_rows, is_disturbed, time_by_implementation

from gpu.report import model_table, rows_table, table
from gpu.rows import is_failure

OURS = "scattermoe"
# No others: ours within PEFT, and layers that compute less, without quantized weights and without LoRA.
BASELINES = ("scattermoe + PEFT", "bfloat16", "frozen")
# Kinds of rows, as the names of layers begin; the layers of experts are named by their model alone.
KINDS = {
    "experts": "MoE layers with LoRA of rank 16, 8192 tokens",
    "attention": "Attention",
    "loss": "Loss of 8192 tokens over 262,144 words",
    "quantized": "Quantized MoE layers",
    "mlp": "MLPs and norms of 8192 tokens",
    "projections": "LoRA on the projections of a dense layer, 8192 tokens",
}
# Layers beside the fastest other: those of CARD on the card, all on the page of results.
CARD = {
    "gemma4": "MoE layer of Gemma 4 26B-A4B, LoRA of rank 16",
    "qwen3": "MoE layer of Qwen3-30B-A3B, LoRA of rank 16",
    "mixtral": "MoE layer of Mixtral 8x7B, LoRA of rank 16",
    "attention-global-8k": "attention, 8 heads of 512",
    "attention-sliding-8k": "attention, 8 heads of 256, a window of 1024",
    "loss-frozen-bf16": "loss over 262,144 words, head frozen",
}
LAYERS = {
    **CARD,
    "attention-global-2k": "attention, 8 heads of 512, 2048 tokens",
    "attention-ratio-2": "attention, 16 heads of 128, 4096 tokens",
    "loss-trained-bf16": "loss, head trained",
    "loss-lora-bf16": "loss, LoRA on the head",
    "quantized-gemma4-nf4": "MoE layer of Gemma 4 26B-A4B in NF4",
    "quantized-gemma4-float8": "MoE layer of Gemma 4 26B-A4B in float8",
    "quantized-gemma4-mxfp4": "MoE layer of Gemma 4 26B-A4B in MXFP4",
    "mlp-geglu-26b": "GeGLU of 2112 columns",
    "mlp-mlp-26b": "MLP of 2816 by 2112, weights frozen",
    "mlp-norm-26b": "RMSNorm of 2816 columns",
    "mlp-add-norm-26b": "residual's sum and RMSNorm",
    "projections-bf16": "dense layer, LoRA on all projections in float32",
    "projections-bf16-adapters": "dense layer, LoRA on all projections in bfloat16",
}


@dataclass(frozen=True)
class Run:
    """A run's folder below ``benchmarks/results``, and its report."""

    folder: str
    report: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.rpartition("/")[2]


def runs_by_device(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Run]]:
    """The runs of each device, the newest first, from files by their paths below ``benchmarks/results``."""
    runs = [
        Run(name.removesuffix("/report.json"), report)
        for name, report in contents.items()
        if name.endswith("/report.json")
    ]
    devices: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.report["date"], reverse=True):
        devices.setdefault(run.report["device"], []).append(run)
    return devices


def latest_rows(runs: Sequence[Run]) -> dict[str, tuple[Run, list[Mapping[str, Any]]]]:
    """By layer the rows of the newest run that timed ours; where none did, of the newest that has the layer.

    Of a run those with the tables that shipped, and where ours was not timed with these, with its sweep's.
    """
    chosen: dict[str, tuple[Run, list[Mapping[str, Any]]]] = {}
    timed: set[str] = set()
    for run, key in itertools.product(runs, ("rows", "rows_with_new_tables")):
        layers: dict[str, list[Mapping[str, Any]]] = {}
        for row in run.report.get(key) or ():
            layers.setdefault(row["layer"], []).append(row)
        for layer, rows in layers.items():
            has_ours = any(row["implementation"] == OURS and "ms" in row for row in rows)
            if layer not in chosen or (has_ours and layer not in timed):
                chosen[layer] = run, rows
            if has_ours:
                timed.add(layer)
    return chosen


def sections(runs: Sequence[Run]) -> Iterator[tuple[str, str, list[str], str | None]]:
    """For each kind of rows its name, its title, its tables, and a picture as SVG where anything was timed."""
    latest = latest_rows(runs)
    for kind, title in KINDS.items():
        chosen = [value for layer, value in latest.items() if kind_of(layer) == kind]
        lines: list[str] = []
        for run in runs:
            rows = [row for source, members in chosen if source is run for row in members]
            if rows:
                lines += [f"Run {run.name}:", "", *rows_table(rows, run.report["card"]["dense_tflops"])]
        timed = [row for _, members in chosen for row in members if "ms" in row]
        if lines:
            subject = f"{title}: forward and backward, {runs[0].report['device']}"
            yield kind, title, lines, time_by_implementation(timed, subject) if timed else None


def kind_of(layer: str) -> str:
    """The one of ``KINDS`` that a layer's name begins with."""
    kind = layer.partition("-")[0]
    return kind if kind in KINDS else "experts"


def overview(runs: Sequence[Run], results: str) -> list[str]:
    """A table of the runs, with their tests; ``results`` is the address of ``benchmarks/results``."""
    lines = []
    for run in runs:
        report, address = run.report, f"{results}/{run.folder}"
        lines.append(
            (
                f"[{run.name}]({address}/report.md) ([json]({address}/report.json))",
                str(report["commit"])[:7],
                versions_of(report),
                f"{report['card']['dense_tflops']:.0f}",
                f"{report['card']['copy_gb_per_s']:.0f}",
                outcome_of_tests(report),
                "; ".join(f"{name}: {outcome}" for name, outcome in report.get("sanitizer", {}).items()),
            )
        )
    header = ("run", "commit", "versions", "dense bfloat16, TFLOP/s", "copy, GB/s", "tests", "memory checks")
    told = [f"- {run.name}: {run.report['about']}" for run in runs if "about" in run.report]
    told += [
        f"- {run.name}: `{name.rpartition('/')[2]}` failed"
        for run in runs
        for name in run.report.get("tests", {}).get("failures", ())
    ]
    return [*table(header, lines), *told, *([""] if told else [])]


def outcome_of_tests(report: Mapping[str, Any]) -> str:
    """Numbers of a report's operator tests in words; nothing where there was no time for any."""
    tests = report.get("tests")
    if not tests:
        return ""
    cut = ", the rest cut off by time" if tests["outcome"] == "cut off" else ""
    return f"{tests['passed']} passed, {tests['failed']} failed{cut}"


def others(runs: Sequence[Run]) -> list[str]:
    """The newest rows with a sweep's own tables, and the newest steps of a whole model."""
    lines = []
    for key, title in (
        ("rows_with_new_tables", "Rows again, with the tables of the sweep"),
        ("model", "Steps of Gemma 4 26B-A4B, random weights"),
    ):
        run = next((run for run in runs if run.report.get(key)), None)
        if run:
            figures, dense = run.report[key], run.report["card"]["dense_tflops"]
            rows = model_table(figures) if key == "model" else rows_table(figures, dense)
            lines += [f"#### {title}", "", f"Run {run.name}:", "", *rows]
    return lines


def beside_fastest(runs: Sequence[Run], titles: Mapping[str, str]) -> list[str]:
    """A table of ours beside the fastest other on the layers of ``titles``, and where the figures are from."""
    latest = {layer: chosen for layer, chosen in latest_rows(runs).items() if layer in titles}
    lines, missing = [], []
    for layer, title in titles.items():
        rows = latest[layer][1] if layer in latest else []
        members = best_rows(rows).get(layer, [])
        ours = next((row for row in members if row["implementation"] == OURS), None)
        other = next((row for row in members if row["implementation"] not in (OURS, *BASELINES)), None)
        if ours and other:
            times = f"{other['ms'] / ours['ms']:.2f}x"
            lines.append((title, _cell(ours), f"{_cell(other)}, {other['implementation']}", times))
        elif ours:
            lines.append((title, _cell(ours), "", ""))
        else:
            reasons = [row["refused"].partition(":")[0] for row in rows if is_failure(row)]
            missing.append(f"{title} ({reasons[0]})" if reasons else title)
    header = ("8192 tokens, forward and backward, bfloat16", OURS, "fastest other", "speed of ours")
    lacking = [f"Not timed: {'; '.join(missing)}.", ""] if missing else []
    sources = {run.folder for run, _ in latest.values()}
    return [
        *table(header, lines),
        *lacking,
        *(f"{provenance(run)}\n" for run in runs if run.folder in sources),
    ]


def _cell(row: Mapping[str, Any]) -> str:
    disturbed = " (disturbed)" if is_disturbed(row) else ""
    return f"{row['ms']:.3g} ms{disturbed}, {row['peak_mb']:.0f} MB"


def provenance(run: Run) -> str:
    """On what, when, with what and from which commit a run's figures are, and what became of its tests."""
    report = run.report
    tests = f" Operator tests: {outcome}." if (outcome := outcome_of_tests(report)) else ""
    return (
        f"`make gpu` on {report['date'][:16].replace('T', ' at ')}, {report['device']}; {versions_of(report)}; commit "
        f"{report['commit']}.{tests}"
    )


def versions_of(report: Mapping[str, Any]) -> str:
    """Names and versions of the packages that a report names."""
    return ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
