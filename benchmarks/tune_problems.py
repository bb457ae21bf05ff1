"""Products on which tune.py tries a rule of a tile table, and torch's results of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scattermoe_lora.ops import activation
from scattermoe_lora.ops import tile_tables as tiles
from scattermoe_lora.ops.activation import Gate
from scattermoe_lora.ops.experts.gpu import project_and_gate
from scattermoe_lora.ops.grouped_linear import gpu
from scattermoe_lora.ops.routing import sort_by_expert

EXPERTS = 32
# Where a rule sets no limit: rows an expert, and sizes of a projection, of models that people train. Gemma 4's
# intermediate size is no multiple of 128, which a block of as many in its sum has to pay for.
ROWS, WIDE, INTERMEDIATE, RANK = 512, 2816, 704, 16


@dataclass(frozen=True)
class Problem:
    """Products that a rule serves, on the GPU, as a call to time, and torch's results of them."""

    call: Callable[[], Sequence[torch.Tensor]]
    expected: Sequence[torch.Tensor]


def layer(rows: int, dtype: torch.dtype, device: str) -> Problem:
    """The wide products of a layer with LoRA: gate/up with its activation, down, and the gradient of what goes into
    gate/up. Their kernels share the rules, and one may spill registers where another does not."""
    index = torch.arange(EXPERTS, device=device).repeat(rows).view(-1, 1)
    routing = sort_by_expert(index, EXPERTS)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.5

    pairs = EXPERTS * rows
    x, a, dh = random(pairs, WIDE), random(pairs, INTERMEDIATE), random(pairs, 2 * INTERMEDIATE)
    up, down = random(EXPERTS, 2 * INTERMEDIATE, WIDE), random(EXPERTS, WIDE, INTERMEDIATE)
    low = random(pairs, RANK)
    up_b, down_b, up_a = (random(EXPERTS, n, RANK) for n in (2 * INTERMEDIATE, WIDE, WIDE))
    gate = Gate("silu")

    def call() -> list[torch.Tensor]:
        hidden, activated = project_and_gate(x, up, routing, 1, (low, up_b), None, gate, True)
        y = gpu.grouped_matmul(a, down, routing, low=(low, down_b))
        dx = gpu.grouped_matmul(dh, up.mT, routing, low=(low, up_a))
        return [hidden, activated, y, dx]

    def by_torch(left: torch.Tensor, weight: torch.Tensor, low_weight: torch.Tensor) -> torch.Tensor:
        result = left @ weight.mT + low.view(EXPERTS, -1, RANK) @ low_weight.mT
        return result.reshape(pairs, -1)

    hidden = by_torch(gathered(x), up, up_b)
    expected = [
        hidden,
        activation.apply(gate, hidden),
        by_torch(a.view(EXPERTS, rows, -1), down, down_b),
        by_torch(dh.view(EXPERTS, rows, -1), up.mT, up_a),
    ]
    return Problem(call, expected)


def problem(kernel: str, rule: tiles.Rule, device: str = "cuda") -> Problem:
    """Products that the rule serves."""
    dtype = torch.bfloat16 if rule.bytes == 2 else torch.float32
    limits = rule.limits
    rows, n, k = limits["rows"] or ROWS, limits["n"] or WIDE, limits["k"] or WIDE
    if is_layer(kernel, rule):
        return layer(rows, dtype, device)
    index = torch.arange(EXPERTS, device=device).repeat(rows).view(-1, 1)
    routing = sort_by_expert(index, EXPERTS)
    left = torch.randn(EXPERTS * rows, k, device=device, dtype=dtype)
    if kernel == "grouped_matmul":
        weight = torch.randn(EXPERTS, n, k, device=device, dtype=dtype)
        expected = (gathered(left) @ weight.mT).reshape(-1, n)
        return Problem(lambda: [gpu.grouped_matmul(left, weight, routing, top_k=1)], [expected])
    right = torch.randn(EXPERTS * rows, n, device=device, dtype=dtype)
    # In the backward one side is in sorted order as it is.
    expected = left.view(EXPERTS, rows, k).mT @ gathered(right)
    return Problem(lambda: [gpu.grouped_outer(left, right, routing, top_k_q=1)], [expected])


def is_layer(kernel: str, rule: tiles.Rule) -> bool:
    """Tell whether a rule serves a layer's own projections, not its low-rank products."""
    return kernel == "grouped_matmul" and rule.limits["n"] is None


def gathered(x: torch.Tensor) -> torch.Tensor:
    """``[E, rows, *]``: each expert's rows, which are as far apart as there are experts."""
    return x.view(-1, EXPERTS, x.shape[1]).transpose(0, 1)
