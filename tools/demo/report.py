"""The tables that the demonstration ends with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table


def print_report(console: Console, summary: dict[str, Any]) -> None:
    """Print the published variants, the file that a consumer loaded, and the training runs side by side."""
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

    training = Table(title="Trained with it, compared with grouped_mm", title_justify="left")
    training.add_column("")
    for name in summary["runs"]:
        training.add_column(name, justify="right")

    def row(label: str, show: Callable[[dict[str, Any]], str]) -> None:
        training.add_row(label, *(show(run) for run in summary["runs"].values()))

    row("steps", lambda run: str(len(run["losses"])))
    row("loss, first step", lambda run: f"{run['losses'][0]:.4f}")
    row("loss, last step", lambda run: f"{run['losses'][-1]:.4f}")
    row("largest difference of loss", lambda run: f"{run['largest_loss_difference']:.1e}")
    row("ms per step, median", lambda run: f"{run['ms_per_step']:.0f}")
    row("speed", lambda run: f"{run['speedup']:.2f}x")
    row("peak memory above the model", lambda run: f"{run['peak_memory_bytes'] / 2**20:.0f} MiB")
    row("memory", lambda run: f"{run['memory_ratio']:.0%}")
    console.print()
    console.print(training)
