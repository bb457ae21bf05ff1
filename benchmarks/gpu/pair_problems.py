"""Problems of the sweep around a layer's products: the sort of its pairs, the sums of its tokens' rows, and the
gradient of its activation, with which a product may end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scattermoe_lora.ops import activation
from scattermoe_lora.ops.activation import Gate
from scattermoe_lora.ops.experts.gpu import gate_gradients
from scattermoe_lora.ops.grouped_linear import pairs
from scattermoe_lora.ops.grouped_linear.schedule import Scheduled
from scattermoe_lora.ops.routing import sort_by_expert

from gpu import problems
from gpu.problems import Layer, Part, Problem, Tensors, values
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


def _d_activation(sizes: Sizes, real: bool) -> Problem:
    """The gradient through the down projection and through the activation before it, in one launch or two."""
    layer, gate = Layer(sizes, real), Gate("gelu_tanh")
    e, h, i, r, s = layer.experts, layer.hidden, layer.intermediate, layer.rank, layer.pairs
    grad, down, hidden = layer.values(layer.tokens, h), layer.values(e, h, i), layer.values(s, 2 * i)
    hidden *= hidden.shape[1] ** 0.5
    low, low_weight = layer.values(s, r), layer.values(e, r, i).mT
    row_weight = torch.rand(s).to(problems.DTYPE)

    def call() -> Tensors:
        routing = Scheduled(*layer.routing)
        return gate_gradients(
            grad, down, routing, layer.top_k, (low, low_weight), hidden, row_weight, gate
        )  # fmt: skip

    def expected() -> Tensors:
        da = layer.product(layer.gathered(grad), down.mT, low, low_weight).float()
        wide = hidden.float().requires_grad_()
        a = activation.apply(gate, wide)
        (dh,) = torch.autograd.grad(a, wide, da * row_weight[layer.routing.order, None])
        return [a.detach(), dh, layer.by_pair((da * a.detach()).sum(1))]

    moved = grad.numel() + down.numel() + 5 * s * i + low.numel() + low_weight.numel()
    return layer.problem("grouped_matmul", i, h, moved, call, expected)


PARTS: Mapping[str, Part] = {
    "sort_pairs": _sort_pairs,
    "sum_choices": _sum_choices,
    "d_activation": _d_activation,
}
