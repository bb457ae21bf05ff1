"""Rows: ours and others' implementations of a layer. Each process prepares beside the others, and is timed alone.

``python -m gpu.rows SPECIFICATION`` is one of the processes; it writes ``FOLDER/NAME.json``, a list of rows.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import replace

from gpu.card import Turns, time_undisturbed
from gpu.processes import Job

# Layers of compare.py, and cases of the other comparisons, those worth most first.
LAYERS = ("gemma4", "mixtral", "qwen3")
IMPLEMENTATIONS = ("scattermoe", "unsloth", "axolotl", "grouped_mm")
CASES = {
    "attention": ("global-8k", "sliding-8k", "global-2k", "ratio-2"),
    "loss": ("frozen-bf16", "trained-bf16", "lora-bf16"),
    "quantized": ("gemma4-nf4", "gemma4-float8", "gemma4-mxfp4"),
    "mlp": ("geglu-26b", "mlp-26b", "norm-26b", "add-norm-26b"),
    "projections": ("bf16", "bf16-adapters"),
}
# Of which an idle card and its clocks give a steady median; what a CPU shows in a dry run is none.
SECONDS = {"cuda": 1.0, "cpu": 0.05}


@dataclass(frozen=True)
class Row:
    """A process: a layer in one implementation, or a case of another comparison in all that take it.

    Attributes:
        kind: ``experts``, or that of ``CASES`` whose comparison is compare_KIND.py.
        layer: A shape of compare.py or a case of the comparison, by name or by its sizes.
        implementation: Of the experts; of a case all that there are run in turns.
        unpacked: Where a peer was prepared.
    """

    name: str
    kind: str
    layer: Any
    implementation: str
    unpacked: str | None = None


def planned(unpacked: Mapping[str, Path]) -> list[Row]:
    """All rows, in order of worth; of the peers those in ``unpacked``."""
    experts = [
        Row(f"{layer}-{name}", "experts", layer, name, str(unpacked[name]) if name in unpacked else None)
        for layer in LAYERS
        for name in IMPLEMENTATIONS
        if name in ("scattermoe", "grouped_mm") or name in unpacked
    ]
    cases = {
        kind: [Row(f"{kind}-{name}", kind, name, "all") for name in names] for kind, names in CASES.items()
    }
    attention, loss, quantized = cases["attention"], cases["loss"], cases["quantized"]
    first = [*experts[:4], *attention[:2], loss[0], quantized[0]]
    layers = [*experts[4:], *attention[2:], *cases["mlp"]]
    return [*first, *layers, *loss[1:], *cases["projections"], *quantized[1:]]


def jobs(
    rows: Sequence[Row], folder: Path, build: Path, device: str, idle_tflops: float, prepare_until: float
) -> list[Job]:  # fmt: skip
    """The processes of rows whose results go to ``folder``; ``build`` is the kernel that they load."""
    common = {
        "folder": str(folder), "device": device, "idle_tflops": idle_tflops, "prepare_until": prepare_until,
    }  # fmt: skip
    environment = {"LOCAL_KERNELS": f"org/scattermoe-lora={build}"}
    return [
        Job(
            row.name,
            [sys.executable, "-m", "gpu.rows", json.dumps({**common, "row": asdict(row)})],
            environment,
        )
        for row in rows
    ]


def collect(folder: Path) -> list[dict[str, Any]]:
    """The rows that there are."""
    return [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]


class _Late(Exception):
    """Preparing took longer than it may."""


def _late(*_: object) -> None:
    raise _Late("was not prepared in time")


class Timing:
    """The turn alone of a row, and what it says of the card."""

    def __init__(self, turns: Turns, dense_tflops: Callable[[], float], idle_tflops: float) -> None:
        self.turns, self.dense_tflops, self.idle_tflops = turns, dense_tflops, idle_tflops
        self.about: dict[str, Any] = {}

    def __call__(self, timed: Callable[[], Any]) -> Any:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with self.turns.alone():
            result, rate, disturbed = time_undisturbed(timed, self.dense_tflops, self.idle_tflops)
        self.about = {"dense_tflops": round(rate, 1), "disturbed": disturbed}
        return result


def measure_experts(row: Row, device: str, timing: Timing) -> list[dict[str, Any]]:
    """The one row of a layer of experts."""
    import layer
    from compare import SHAPES

    shape = SHAPES[row.layer] if isinstance(row.layer, str) else layer.Shape(**row.layer)
    unpacked = Path(row.unpacked) if row.unpacked else None
    figures = layer.measure(shape, row.implementation, device, unpacked, timing, SECONDS[device])
    return [
        {
            "layer": row.name.rpartition("-")[0], "implementation": row.implementation, "ms": figures["ms"],
            "runs": figures["repeats"], "peak_mb": figures["peak_bytes_above_weights"] / 1e6,
            "tflops": shape.flops() / figures["ms"] / 1e9, **timing.about,
        }
    ]  # fmt: skip


def measure_case(row: Row, device: str, timing: Timing) -> list[dict[str, Any]]:
    """A row for each implementation of a comparison's case, with the reason where it refuses the case."""
    from kernels import get_kernel

    comparison = importlib.import_module(f"compare_{row.kind}")
    by_name = isinstance(row.layer, str)
    case = comparison.CASES["cuda"][row.layer] if by_name else comparison.Case(**row.layer)
    kernel = get_kernel("org/scattermoe-lora", version=1)
    rows = []
    for name, figures in comparison.measure(kernel, case, device, SECONDS[device], timing).items():
        described = {"layer": row.name, "implementation": name}
        if "not" in figures:
            rows.append({**described, "refused": figures["not"]})
            continue
        peak = next(size for key, size in figures.items() if key.startswith("peak_bytes")) / 1e6
        measured = {"ms": figures["ms"], "runs": figures["runs"], "peak_mb": peak}
        if hasattr(case, "flops"):
            measured["tflops"] = case.flops() / figures["ms"] / 1e9
        if "difference" in figures:
            measured["difference"] = figures["difference"]
        rows.append({**described, **measured, **timing.about})
    return rows


def is_failure(row: Mapping[str, Any]) -> bool:
    """True if ours, with whatever is beside it, refused."""
    return "refused" in row and (row["implementation"] == "all" or "scattermoe" in row["implementation"])


def main() -> None:
    given = json.loads(sys.argv[1])
    row, folder = Row(**given["row"]), Path(given["folder"])
    turns = Turns(folder.parent, row.name)
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, max(given["prepare_until"] - time.monotonic(), 0.01))

    def dense_tflops() -> float:
        if given["device"] == "cpu":
            return float(given["idle_tflops"])
        from compare_attention import dense_rate

        return dense_rate("bfloat16", "cuda") / 1e12

    timing = Timing(turns, dense_tflops, given["idle_tflops"])
    measure = measure_experts if row.kind == "experts" else measure_case
    failed = None
    try:
        rows = measure(row, given["device"], timing)
    except _Late as late:
        failed = str(late)
    except Exception as error:  # noqa: BLE001 - whatever an implementation fails with, the others run
        lines = str(error).strip().splitlines() or ["no reason given"]
        failed = f"{type(error).__name__}: {lines[0][:120]}"
    if failed:
        layer = row.name.rpartition("-")[0] if row.kind == "experts" else row.name
        rows = [{"layer": layer, "implementation": row.implementation, "refused": failed}]
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / f"{row.name}.json", json.dumps(rows, indent=2))
    # A refusal of ours is a failure.
    sys.exit(any(is_failure(row) for row in rows))


if __name__ == "__main__":
    main()
