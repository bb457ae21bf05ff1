"""The main job's last words: one table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_report(console: Console, summary: dict[str, Any]) -> None:
    """Prints what was published, where a consumer loaded it from, and how the two training runs compare."""
    facts = Table(title="Published and loaded back", title_justify="left", show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, identifier in summary["variants"].items():
        facts.add_row(name, identifier)
    facts.add_row("Hub", f"{summary['endpoint']}/kernels/{summary['repo_id']}")
    for branch in summary["branches"]:
        facts.add_row(f"branch {branch['name']}", f"commit {branch['commit']}")
    facts.add_row("loaded from", summary["consumer"]["file"])
    facts.add_row("at revision", str(summary["consumer"]["revision"]))
    console.print()
    console.print(facts)

    runs = summary["runs"]
    training = Table(title="Trained with it", title_justify="left")
    training.add_column("")
    for name in runs:
        training.add_column(name, justify="right")
    training.add_column("compared", justify="right")

    def row(label: str, show: Any, compared: str = "") -> None:
        training.add_row(label, *(show(run) for run in runs.values()), compared)

    ours, theirs = runs.values()
    memory_ratio = ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    row("loss, first step", lambda run: f"{run['losses'][0]:.4f}")
    row(
        "loss, last step",
        lambda run: f"{run['losses'][-1]:.4f}",
        f"largest difference {summary['largest_loss_difference']:.1e}",
    )
    row("ms per step (median)", lambda run: f"{run['ms_per_step']:.1f}", f"{summary['speedup']:.2f}x faster")
    row(
        "peak memory above the model",
        lambda run: f"{run['peak_memory_bytes'] / 2**20:.0f} MiB",
        f"{memory_ratio:.2f} of it",
    )
    console.print()
    console.print(training)
