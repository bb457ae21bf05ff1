"""The memory that a loss over Gemma 4's 262,144 words takes, against the number of tokens, as figures and a picture.

Forward and backward by a frozen bfloat16 head and by a trained one, of 64 hidden states: the logits' memory does not
depend on their number. Bytes above inputs and gradients are counted at each allocation, so it does not matter what else
the machine does. Writes an SVG, and the figures beside it as JSON.

    python benchmarks/loss_memory.py benchmarks/results/loss-memory.svg
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compare_loss import OURS, implementations
from interleaved import peak_bytes
from measuring import built_kernel, device_name, write
from pictures import OTHERS, Bar, bars
from pictures import OURS as COLOUR

TOKENS, WIDTH, WORDS = (64, 128, 256, 512), 64, 262144


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

            def step(loss: Any = loss, inputs: Any = (hidden, weight, labels), leaves: Any = leaves) -> Any:
                return torch.autograd.grad(loss(*inputs, None, None), leaves)

            step()
            peak = peak_bytes(step, "cpu") - sum(leaf.nbytes for leaf in leaves)
            rows.setdefault(name, []).append(peak)
    return rows


def picture(results: dict[str, dict[str, list[int]]], counts: Sequence[int]) -> str:
    """An SVG with a bar for each head, number of tokens and implementation, all of one scale."""
    groups = {
        f"{tokens:,} tokens, {head} head": [
            Bar(name, peaks[i], f"{peaks[i] / 1e6:,.0f} MB", COLOUR if name == OURS else OTHERS)
            for name, peaks in rows.items()
        ]
        for head, rows in results.items()
        for i, tokens in enumerate(counts)
    }
    most = max(bar.value for members in groups.values() for bar in members)
    return bars("Loss over 262,144 words: memory above inputs and gradients", groups, most)


def main() -> None:
    path = Path(sys.argv[1])
    with built_kernel() as kernel:
        results = {name: measure(kernel, name == "trained", TOKENS) for name in ("frozen", "trained")}
    for head, rows in results.items():
        for name, peaks in rows.items():
            print(f"{head:<8}{name:<18}" + "".join(f"{peak / 1e6:>9.1f}" for peak in peaks), "MB")
    described = {"device": device_name("cpu"), "tokens": TOKENS, "width": WIDTH, "words": WORDS}
    write(path.with_suffix(".json"), {**described, "peak_bytes": results})
    path.write_text(picture(results, TOKENS))


if __name__ == "__main__":
    main()
