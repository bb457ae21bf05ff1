"""The loss over a vocabulary, forward and backward: ours, logits in memory, and other libraries' where installed.

1,024 tokens of 1,024 hidden states over 65,536 words on a CPU, 8,192 of 2,816 over Gemma 4's 262,144 on a GPU, with a
frozen head, a trained one, and one with LoRA. All implementations of a case run in turns in one process, on the same
tensors. Prints a table of medians; ``--output`` also writes the figures as JSON, with date, device, versions and the
commit that they belong to.

    python benchmarks/compare_loss.py [--device cuda] [--cases frozen-fp32,...] [--output FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import FirstResults, measure_in_turns, peak_bytes
from measuring import Alone, compare_cases, comparison_parser, parse_cases, run_beside_others

OURS, UNFUSED = "scattermoe", "logits in memory"
RANK = 16


@dataclass(frozen=True)
class Case:
    """``tokens`` of ``width`` over ``words``; what of the head is trained is ``nothing``, ``weight`` or ``lora``."""

    trained: str
    dtype: str
    tokens: int
    width: int
    words: int

    def flops(self) -> int:
        """Of the products with the head: the logits, hidden states' gradient and, if it is trained, the head's."""
        products = 3 if self.trained == "weight" else 2
        return products * 2 * self.tokens * self.width * self.words


def _cases(dtypes: dict[str, str], *sizes: int) -> dict[str, Case]:
    names = {"frozen": "nothing", "trained": "weight", "lora": "lora"}
    return {
        f"{name}-{short}": Case(trained, dtype, *sizes)
        for short, dtype in dtypes.items()
        for name, trained in names.items()
    }


CASES = {
    "cpu": _cases({"fp32": "float32", "bf16": "bfloat16"}, 1024, 1024, 65536),
    "cuda": _cases({"bf16": "bfloat16"}, 8192, 2816, 262144),
}

Loss = Callable[..., torch.Tensor]
"""Of hidden states, weight, labels and a LoRA pair or two None."""


def unfused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    """As transformers computes it."""
    logits = F.linear(hidden, weight)
    if a is not None:
        logits = logits + F.linear(F.linear(hidden, a), b)
    return F.cross_entropy(logits.float(), labels)


def ours(kernel: Any, hidden: Any, weight: Any, labels: Any, a: Any, b: Any) -> Any:
    return kernel.linear_cross_entropy(hidden, weight, labels, lora_a=a, lora_b=b)


def liger(hidden: Any, weight: Any, labels: Any, a: Any, b: Any) -> Any:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if a is not None:
        raise NotImplementedError("no LoRA on the head")
    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def cut(hidden: Any, weight: Any, labels: Any, a: Any, b: Any) -> Any:
    from cut_cross_entropy import linear_cross_entropy

    if a is not None:
        raise NotImplementedError("no LoRA on the head")
    return linear_cross_entropy(hidden, weight, labels)


def implementations(kernel: Any, device: str) -> Iterator[tuple[str, Loss]]:
    yield OURS, partial(ours, kernel)
    yield UNFUSED, unfused
    # Triton kernels: they need a GPU.
    if device == "cuda":
        yield "liger", liger
        yield "cut_cross_entropy", cut


def measure(
    kernel: Any, case: Case, device: str, seconds: float, alone: Alone = run_beside_others
) -> dict[str, Any]:
    """The case's rows, as of :func:`measure_in_turns`.

    With peak memory above inputs and gradients, and the error of the hidden states' gradient.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    hidden = random(case.tokens, case.width).requires_grad_()
    weight = random(case.words, case.width, scale=case.width**-0.5).requires_grad_(case.trained == "weight")
    labels = torch.randint(case.words, (case.tokens,), generator=generator, device=device)
    pair: tuple[Any, Any] = (None, None)
    if case.trained == "lora":
        pair = (random(RANK, case.width, scale=case.width**-0.5), random(case.words, RANK, scale=0.1))
    factors = [factor.requires_grad_() for factor in pair if factor is not None]
    leaves = [hidden, *([weight] if weight.requires_grad else []), *factors]

    def step(loss: Loss) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(hidden, weight, labels, *pair), leaves)

    first = FirstResults()

    def describe(step: Callable[[], tuple[torch.Tensor, ...]]) -> dict[str, Any]:
        gradients = step()
        size, difference = sum(t.nbytes for t in gradients), first.difference(gradients[:1])
        del gradients
        peak = peak_bytes(step, device) - size
        return {"peak_bytes_above_inputs_and_gradients": peak, "difference": difference}

    makers = {
        name: partial(partial, step, loss)  # one that makes the step
        for name, loss in implementations(kernel, device)
    }
    return measure_in_turns(makers, describe, device, seconds, alone)


def show(name: str, case: Case, rows: dict[str, Any]) -> None:
    print(f"\n{name}: {case}\n{'':<20}{'ms':>9}{'runs':>6}{'MB above inputs and gradients':>31}")
    for implementation, row in rows.items():
        if "not" in row:
            print(f"{implementation:<20}  {row['not']}")
            continue
        megabytes = row["peak_bytes_above_inputs_and_gradients"] / 1e6
        print(f"{implementation:<20}{row['ms']:>9.1f}{row['runs']:>6}{megabytes:>31.1f}")
    mine = rows[OURS]
    for implementation, row in rows.items():
        if "ms" in mine and "ms" in row and implementation != OURS:
            memory = (
                row["peak_bytes_above_inputs_and_gradients"] / mine["peak_bytes_above_inputs_and_gradients"]
            )
            print(
                f"{'':<20}{row['ms'] / mine['ms']:>8.2f}x {implementation}, with 1/{memory:.0f} of its memory",
                flush=True,
            )


def main() -> None:
    arguments, cases = parse_cases(comparison_parser(__doc__, list(CASES)), CASES, 10.0)
    if arguments.device == "cpu":
        print(
            "liger and cut_cross_entropy are not compared: their kernels are Triton's, for GPUs alone",
            flush=True,
        )

    def measured(kernel: Any, name: str, case: Case) -> dict[str, Any]:
        rows = measure(kernel, case, arguments.device, arguments.seconds)
        show(name, case, rows)
        return rows

    compare_cases(arguments, cases, measured, OURS)


if __name__ == "__main__":
    main()
