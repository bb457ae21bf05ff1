"""Problems of the sweep beside layers of experts and attention: the loss, activation, norms and decoding."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from scattermoe_lora.ops.gated_activation import gpu as gated_gpu
from scattermoe_lora.ops.linear_cross_entropy import gpu as loss_gpu
from scattermoe_lora.ops.linear_cross_entropy.arguments import Operands as LossOperands
from scattermoe_lora.ops.linear_cross_entropy.arguments import Settings, Statistics, StatisticsGradients
from scattermoe_lora.ops.quantization import gpu as decoding
from scattermoe_lora.ops.quantization.formats import Format
from scattermoe_lora.ops.rms_norm import gpu as rms_gpu
from scattermoe_lora.ops.rms_norm.arguments import Operands as NormOperands
from scattermoe_lora.ops.rms_norm.reference import rms_norm

from gpu import problems
from gpu.problems import Part, Problem, Tensors, decoded, make_stack, values
from gpu.sweep_plan import Sizes

# Gemma's, for the logits.
SOFTCAP = 30.0
# Standard deviation of the logits. By the labels' logits, and the rest of the softmax, each block is in the results.
SPREAD = 3.0
# Of float32 logits that torch's results are computed of at a time; all of them would be gigabytes.
LOGITS_BYTES = 1 << 29


def _loss(part: str, sizes: Sizes, real: bool) -> Problem:
    tokens, width, words = sizes["tokens"], sizes["hidden"], sizes["words"]
    hidden = values(real, tokens, width)
    hidden *= SPREAD * width**0.5
    weight, labels = values(real, words, width), torch.randint(words, (tokens,))
    operands = LossOperands(hidden, weight, None, None, None, labels, None)
    settings = Settings(1.0, SOFTCAP, False, False, False, False)
    d_lse, d_label = torch.randn(tokens), torch.randn(tokens)
    gradients = StatisticsGradients(d_lse, d_label, None, None)

    @functools.cache
    def expected() -> tuple[torch.Tensor, ...]:
        return _expected_loss(hidden, weight, labels, d_lse, d_label)

    lse = expected()[0] if real and part == "logits_backward" else torch.empty(tokens)
    statistics = Statistics(lse, *(lse.new_empty(0) for _ in range(4)), hidden.new_empty(0, width))

    def forward() -> Tensors:
        return loss_gpu.forward(operands, settings)[:2]

    def backward(names: Collection[str] = ()) -> Tensors:
        return [*loss_gpu.backward(gradients, operands, statistics, settings, names).values()]

    is_forward = part == "logits_forward"
    moved = hidden.numel() + weight.numel() + (0 if is_forward else tokens * words)
    return Problem(
        "linear_cross_entropy", part, {}, 2 * tokens * width * words, 2 * moved,
        forward if is_forward else backward,
        lambda: expected()[:2] if is_forward else expected()[2:],
        (f"{part}_kernel",),
        # What the kernel writes, torch multiplies with the weight.
        None if is_forward else lambda: backward(["hidden"]),
    )  # fmt: skip


def _expected_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    d_lse: torch.Tensor,
    d_label: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """``(lse, label_logit, d_hidden)``, some tokens at a time."""
    precision = torch.get_float32_matmul_precision()
    # With 10 bits of the fraction products of bfloat16 are exact.
    torch.set_float32_matmul_precision("high" if hidden.dtype == torch.bfloat16 else "highest")
    wide, parts = weight.float(), []
    try:
        size = max(LOGITS_BYTES // (4 * weight.shape[0]), 1)
        for start in range(0, hidden.shape[0], size):
            own = slice(start, start + size)
            tanh = (hidden[own].float() @ wide.mT).div_(SOFTCAP).tanh_()
            lse = (SOFTCAP * tanh).logsumexp(-1)
            label_logit = SOFTCAP * tanh.gather(-1, labels[own, None])[:, 0]
            d = (SOFTCAP * tanh).sub_(lse[:, None]).exp_().mul_(d_lse[own, None])
            d.scatter_add_(-1, labels[own, None], d_label[own, None])
            d.mul_(tanh.square_().neg_().add_(1))
            parts.append((lse, label_logit, d @ wide))
    finally:
        torch.set_float32_matmul_precision(precision)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _gated(part: str, sizes: Sizes, real: bool) -> Problem:
    shape = sizes["tokens"], sizes["intermediate"]
    gate, up, dy = (values(real, *shape) * shape[1] ** 0.5 for _ in range(3))

    def expected() -> Tensors:
        leaves = [t.float().requires_grad_() for t in (gate, up)]
        y = F.gelu(leaves[0], approximate="tanh") * leaves[1]
        return [y.detach()] if part == "gated_forward" else torch.autograd.grad(y, leaves, dy.float())

    def call() -> Tensors:
        if part == "gated_forward":
            return [gated_gpu.forward(gate, up, "gelu_tanh")]
        return gated_gpu.backward(dy, gate, up, "gelu_tanh")

    moved = (3 if part == "gated_forward" else 5) * gate.numel()
    return Problem("gated_activation", part, {"columns": shape[1]}, 0, 2 * moved, call, expected)


def _rms(part: str, sizes: Sizes, real: bool) -> Problem:
    """The norm of a sum with the residual if ``added``; its weight is frozen."""
    shape, added = (sizes["tokens"], sizes["hidden"]), sizes["added"]
    x, residual, dy, d_total = (values(real, *shape) * shape[1] ** 0.5 for _ in range(4))
    weight = values(real, shape[1]) + 1
    operands = NormOperands(x, weight, 1e-6, 0.0, False)

    def expected() -> Tensors:
        total = x.float().requires_grad_()
        if part == "rms_forward":
            y, total = rms_norm(total.detach(), weight.float(), residual=residual.float() if added else None)
            return [y, total] if added else [y]
        y, _ = rms_norm(total, weight.float())
        (dx,) = torch.autograd.grad(y, total, dy.float())
        return [dx + d_total.float() if added else dx]

    def call() -> Tensors:
        if part == "rms_forward":
            y, total = rms_gpu.forward(operands, residual if added else None)
            return [y, total] if added else [y]
        return [rms_gpu.backward(dy, d_total if added else None, operands, ["x"])["x"]]

    moved = ((2 if part == "rms_forward" else 3) + added * (2 if part == "rms_forward" else 1)) * x.numel()
    return Problem("rms_norm", part, {"columns": shape[1], "added": added}, 0, 2 * moved, call, expected)


def _decode(sizes: Sizes, real: bool) -> Problem:
    """The share of a layer's matrices that one workspace takes."""
    experts, n, k = sizes["experts"], 2 * sizes["intermediate"], sizes["hidden"]
    stack = make_stack(Format(sizes["element"], *sizes["block"]), experts, n, k, real)
    out = torch.empty(experts, n, k, dtype=problems.DTYPE)
    return Problem(
        "quantization", "decode", {"n": n, "k": k}, 0, stack.nbytes + 2 * out.numel(),
        lambda: [decoding.decode(stack, range(experts), out)], lambda: [decoded(stack)],
    )  # fmt: skip


PARTS: Mapping[str, Part] = {
    **{
        f"logits_{way}": lambda s, real, way=way: _loss(f"logits_{way}", s, real)
        for way in ("forward", "backward")
    },
    **{
        f"gated_{way}": lambda s, real, way=way: _gated(f"gated_{way}", s, real)
        for way in ("forward", "backward")
    },
    **{f"rms_{way}": lambda s, real, way=way: _rms(f"rms_{way}", s, real) for way in ("forward", "backward")},
    "decode": _decode,
}
