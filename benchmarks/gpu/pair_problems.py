"""Problems of the sweep around a layer's products: the sort of its pairs, and the sums of its tokens' rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scattermoe_lora.ops.grouped_linear import pairs
from scattermoe_lora.ops.routing import sort_by_expert

from gpu import problems
from gpu.problems import Part, Problem, Tensors, values
from gpu.sweep_plan import Sizes


def _sort_pairs(sizes: Sizes, real: bool) -> Problem:
    """Without a rule torch sorts, in the eight launches that the operators make then."""
    experts, shape = sizes["experts"], (sizes["tokens"], sizes["top_k"])
    index = torch.randint(experts, shape)

    def call() -> Tensors:
        return pairs.sort_pairs(index, experts) or sort_by_expert(index, experts)

    def expected() -> Tensors:
        sorted_index, order = index.flatten().sort(stable=True)
        return [order, torch.searchsorted(sorted_index, torch.arange(experts + 1))]

    moved = 2 * index.nbytes + (experts + 1) * index.itemsize
    looked_up = {"pairs": index.numel(), "experts": experts}
    return Problem(
        "grouped_linear", "sort_pairs", looked_up, 0, moved, call, expected, itemsize=index.itemsize
    )


def _sum_choices(sizes: Sizes, real: bool) -> Problem:
    tokens, top_k, columns = sizes["tokens"], sizes["top_k"], sizes["hidden"]
    by_pair = values(real, tokens * top_k, columns)
    return Problem(
        "grouped_linear", "sum_choices", {"n": columns, "k": top_k}, 0,
        problems.DTYPE.itemsize * tokens * (top_k + 1) * columns,
        lambda: [pairs.sum_choices(by_pair, tokens)],
        lambda: [by_pair.float().view(tokens, top_k, columns).sum(1)],
    )  # fmt: skip


PARTS: Mapping[str, Part] = {"sort_pairs": _sort_pairs, "sum_choices": _sum_choices}
