"""The memory that a loss over Gemma 4's 262,144 words takes, against the number of tokens, as figures and a picture.

Forward and backward by a frozen bfloat16 head and by a trained one, 256 hidden states wide: the logits' memory does not
depend on that. Bytes above inputs and gradients, counted at each allocation; so it does not matter what else the machine
does. Writes a PNG, and the figures beside it as JSON, with date, device, versions and the commit they belong to.

    python benchmarks/loss_memory.py benchmarks/results/loss-memory.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compare_attention import built_kernel, peak_bytes
from compare_loss import implementations
from matplotlib.figure import Figure
from measuring import device_name, write

TOKENS, WIDTH, WORDS = (128, 256, 512, 1024, 2048), 256, 262144


def measure(kernel: Any, trained: bool, counts: Sequence[int], words: int = WORDS) -> dict[str, list[int]]:
    """By implementation, the peak bytes above inputs and gradients for each number of tokens."""
    weight = (torch.randn(words, WIDTH) / WIDTH**0.5).bfloat16().requires_grad_(trained)
    rows: dict[str, list[int]] = {}
    for tokens in counts:
        hidden, labels = (
            torch.randn(tokens, WIDTH).bfloat16().requires_grad_(),
            torch.randint(words, (tokens,)),
        )
        leaves = [hidden, weight] if trained else [hidden]
        for name, loss in implementations(kernel, "cpu"):

            def step(
                loss: Any = loss, hidden: Any = hidden, labels: Any = labels
            ) -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(loss(hidden, weight, labels, None, None), leaves)

            step()
            peak = peak_bytes(step, "cpu") - sum(leaf.nbytes for leaf in leaves)
            rows.setdefault(name, []).append(peak)
    return rows


def draw(results: dict[str, dict[str, list[int]]], counts: Sequence[int], path: Path) -> None:
    """Write a PNG with a panel for each head, both axes logarithmic."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (head, rows) in zip(axes, results.items(), strict=True):
        for name, peaks in rows.items():
            axis.loglog(counts, [peak / 1e6 for peak in peaks], marker="o", label=name)
        axis.set(title=f"{head} head", xlabel="tokens", xticks=counts, xticklabels=list(map(str, counts)))
        axis.set_ylabel("peak above inputs and gradients, MB")
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, format="png", dpi=110)


def main() -> None:
    path = Path(sys.argv[1])
    with built_kernel() as kernel:
        results = {name: measure(kernel, name == "trained", TOKENS) for name in ("frozen", "trained")}
    for head, rows in results.items():
        for name, peaks in rows.items():
            print(f"{head:<8}{name:<18}" + "".join(f"{peak / 1e6:>9.1f}" for peak in peaks), "MB")
    described = {"device": device_name("cpu"), "tokens": TOKENS, "width": WIDTH, "words": WORDS}
    write(path.with_suffix(".json"), {**described, "peak_bytes": results})
    draw(results, TOKENS, path)


if __name__ == "__main__":
    main()
