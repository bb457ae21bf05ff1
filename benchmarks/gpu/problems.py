"""What the sweep times: one launch of a kernel in a layer, as a call, torch's results of it, and its least work.

The names of parts, sizes and candidates are data, in ``plan.json``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from scattermoe_lora.ops import activation
from scattermoe_lora.ops.activation import Gate
from scattermoe_lora.ops.attention import gpu as attention_gpu
from scattermoe_lora.ops.attention.arguments import Operands as AttentionOperands
from scattermoe_lora.ops.attention.arguments import Settings
from scattermoe_lora.ops.experts.gpu import project_and_gate
from scattermoe_lora.ops.grouped_linear import gpu
from scattermoe_lora.ops.norm_rotary import gpu as norm_gpu
from scattermoe_lora.ops.norm_rotary.arguments import Operands as NormOperands
from scattermoe_lora.ops.norm_rotary.reference import rms_norm_rotary
from scattermoe_lora.ops.quantization import reference
from scattermoe_lora.ops.quantization.formats import Format
from scattermoe_lora.ops.quantization.stack import QuantizedStack, Weight
from scattermoe_lora.ops.routing import sort_by_expert

from gpu.sweep_plan import Sizes

DTYPE = torch.bfloat16
Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """One kernel on one layer.

    Attributes:
        operator, kernel: The folder of ``ops`` whose tile tables say how it is launched, and its name in them.
        sizes: What its rule is looked up by.
        flop, bytes: Of the base product; each operand read once and each result written once.
        call: Launches it, and what it cannot be called without.
        expected: torch's results of the call.
        timed: The Triton kernels that count; all if there are none.
        results: Computes what ``expected`` has, where a call alone does not: with products by torch, say.
        itemsize: Of the elements that its rule is looked up by, in bytes.
    """

    operator: str
    kernel: str
    sizes: Sizes
    flop: float
    bytes: float
    call: Callable[[], Tensors]
    expected: Callable[[], Tensors]
    timed: tuple[str, ...] = ()
    results: Callable[[], Tensors] | None = None
    itemsize: int = DTYPE.itemsize


def values(real: bool, *shape: int) -> torch.Tensor:
    """Random values, or memory as it is where nothing reads them."""
    if not real:
        return torch.empty(shape, dtype=DTYPE)
    return (torch.randn(shape) / shape[-1] ** 0.5).to(DTYPE)


def make_stack(layout: Format, experts: int, n: int, k: int, real: bool) -> QuantizedStack:
    """A stack ``[experts, n, k]`` of random codes, each scale near ``k**-0.5``; or of memory as it is."""
    codes_shape = experts, n, k // layout.codes_per_byte
    if layout.is_flat:
        scales_shape: tuple[int, ...] = (experts * n * k // layout.columns,)
    else:
        scales_shape = experts, -(-n // layout.rows), -(-k // layout.columns)
    if not real:
        codes, scales = torch.empty(codes_shape, dtype=torch.uint8), torch.empty(scales_shape)
    else:
        # Of float8's codes, those below the two that are no numbers.
        codes = torch.randint(0x7F if layout.codes_per_byte == 1 else 0x100, codes_shape, dtype=torch.uint8)
        scales = (0.5 + torch.rand(scales_shape)) * k**-0.5
    if layout.element == "e2m1":
        scales = scales.to(torch.float8_e8m0fnu)
    return QuantizedStack(codes, (scales,), layout, DTYPE)


def decoded(stack: QuantizedStack) -> torch.Tensor:
    """A stack of :func:`make_stack` as dense matrices, one at a time: decoding takes 8 bytes and more an element."""
    scales = stack.scales[0].view(
        stack.codes.shape[0], *([-1] if stack.format.is_flat else stack.scales[0].shape[1:])
    )
    matrices = [
        QuantizedStack(codes[None], (own if stack.format.is_flat else own[None],), stack.format, stack.dtype)
        for codes, own in zip(stack.codes, scales, strict=True)
    ]
    return torch.cat([reference.decode(matrix) for matrix in matrices])


class Layer:
    """Rows, weights and factors of one MoE layer, and products by torch, expert by expert."""

    def __init__(self, sizes: Sizes, real: bool) -> None:
        self.real, self.experts, self.top_k = real, sizes["experts"], sizes["top_k"]
        self.hidden, self.intermediate, self.rank = sizes["hidden"], sizes["intermediate"], sizes["rank"]
        index = torch.rand(sizes["tokens"], self.experts).topk(self.top_k).indices
        self.routing = sort_by_expert(index, self.experts)
        self.tokens, self.pairs = sizes["tokens"], sizes["tokens"] * self.top_k

    def values(self, *shape: int) -> torch.Tensor:
        return values(self.real, *shape)

    def each(self) -> Iterator[tuple[int, slice]]:
        """Each expert and its rows, in sorted order."""
        for expert, (begin, end) in enumerate(itertools.pairwise(self.routing.offsets.tolist())):
            yield expert, slice(begin, end)

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.routing.order // (self.pairs // x.shape[0])]

    def product(
        self, rows: torch.Tensor, weight: torch.Tensor, low: torch.Tensor | None = None,
        low_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        result = rows.new_empty(self.pairs, weight.shape[1])
        for expert, own in self.each():
            result[own] = rows[own] @ weight[expert].mT
            if low is not None and low_weight is not None:
                result[own] += low[own] @ low_weight[expert].mT
        return result

    def by_pair(self, rows: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(rows)
        result[self.routing.order] = rows
        return result

    def problem(
        self, kernel: str, n: int, k: int, moved: int, call: Callable[[], Tensors], expected: Callable[[], Tensors]
    ) -> Problem:  # fmt: skip
        sizes = {"rows": self.pairs / self.experts, "n": n, "k": k}
        return Problem("grouped_linear", kernel, sizes, 2 * self.pairs * n * k, 2 * moved, call, expected)


def _gate_up(sizes: Sizes, real: bool) -> Problem:
    layer, gate = Layer(sizes, real), Gate("silu")
    e, h, i, r, s = layer.experts, layer.hidden, layer.intermediate, layer.rank, layer.pairs
    x, weight = layer.values(layer.tokens, h), layer.values(e, 2 * i, h)
    low, low_weight = layer.values(s, r), layer.values(e, 2 * i, r)

    def expected() -> Tensors:
        projected = layer.product(layer.gathered(x), weight, low, low_weight)
        return [projected, activation.apply(gate, projected)]

    def call() -> Tensors:
        return project_and_gate(x, weight, layer.routing, layer.top_k, (low, low_weight), None, gate, True)

    moved = x.numel() + weight.numel() + 3 * s * i + low.numel() + low_weight.numel()
    return layer.problem("grouped_matmul", 2 * i, h, moved, call, expected)


def _matmul(
    sizes: Sizes, real: bool, n: str, k: str, transposed: bool, gather: bool, scatter: bool, weighted: bool = False,
    quantized: bool = False,
) -> Problem:  # fmt: skip
    """A wide product with its low-rank term, its weight in NF4 if ``quantized``; ``n`` and ``k`` name sizes of the
    layer."""
    layer = Layer(sizes, real)
    columns = {"hidden": layer.hidden, "intermediate": layer.intermediate, "both": 2 * layer.intermediate}
    e, r, s, n_out, n_in = layer.experts, layer.rank, layer.pairs, columns[n], columns[k]
    x = layer.values(layer.tokens if gather else s, n_in)
    stored, stored_low = ((n_in, n_out), (r, n_out)) if transposed else ((n_out, n_in), (n_out, r))
    nf4 = Format("nf4", 0, 64)
    weight: Weight = make_stack(nf4, e, *stored, real=real) if quantized else layer.values(e, *stored)
    low_weight = layer.values(e, *stored_low)
    if transposed:
        weight, low_weight = weight.mT, low_weight.mT
    low = layer.values(s, r)
    row_weight = torch.rand(s).to(DTYPE) if weighted else None

    def call() -> Tensors:
        y = gpu.grouped_matmul(
            x, weight, layer.routing, top_k=layer.top_k if gather else None, low=(low, low_weight),
            row_weight=row_weight, scatter=scatter,
        )  # fmt: skip
        return [y]

    def expected() -> Tensors:
        dense = decoded(weight) if isinstance(weight, QuantizedStack) else weight
        y = layer.product(layer.gathered(x) if gather else x, dense, low, low_weight)
        y = layer.by_pair(y) if scatter else y
        if row_weight is None:
            return [y]
        return [y * (row_weight if scatter else row_weight[layer.routing.order])[:, None]]

    moved = x.numel() + s * n_out + low.numel() + low_weight.numel()
    if isinstance(weight, QuantizedStack):
        moved += weight.nbytes // DTYPE.itemsize
        problem = layer.problem("quantized_matmul", n_out, n_in, moved, call, expected)
        return replace(problem, timed=("quantized_matmul_kernel",))
    return layer.problem("grouped_matmul", n_out, n_in, moved + weight.numel(), call, expected)


def _low_rank(sizes: Sizes, real: bool) -> Problem:
    layer = Layer(sizes, real)
    x, a = layer.values(layer.tokens, layer.hidden), layer.values(layer.experts, layer.rank, layer.hidden)
    moved = x.numel() + a.numel() + layer.pairs * layer.rank
    return layer.problem(
        "grouped_matmul", layer.rank, layer.hidden, moved,
        lambda: [gpu.grouped_matmul(x, a, layer.routing, top_k=layer.top_k)],
        lambda: [layer.product(layer.gathered(x), a)],
    )  # fmt: skip


def _outer_a(sizes: Sizes, real: bool) -> Problem:
    layer = Layer(sizes, real)
    low, x = layer.values(layer.pairs, layer.rank), layer.values(layer.tokens, layer.hidden)
    moved = low.numel() + x.numel() + layer.experts * layer.rank * layer.hidden
    return layer.problem(
        "grouped_outer", layer.hidden, layer.rank, moved,
        lambda: [gpu.grouped_outer(low, x, layer.routing, top_k_q=layer.top_k)],
        lambda: [torch.stack([low[own].mT @ layer.gathered(x)[own] for _, own in layer.each()])],
    )  # fmt: skip


def _outer_b(sizes: Sizes, real: bool) -> Problem:
    layer = Layer(sizes, real)
    grad, low = layer.values(layer.pairs, 2 * layer.intermediate), layer.values(layer.pairs, layer.rank)
    moved = grad.numel() + low.numel() + layer.experts * layer.rank * 2 * layer.intermediate
    return layer.problem(
        "grouped_outer", layer.rank, 2 * layer.intermediate, moved,
        lambda: [gpu.grouped_outer(grad, low, layer.routing)],
        lambda: [torch.stack([grad[own].mT @ low[own] for _, own in layer.each()])],
    )  # fmt: skip


def _attention(kernel: str, sizes: Sizes, real: bool) -> Problem:
    length, d, heads, key_heads = sizes["length"], sizes["head_dim"], sizes["heads"], sizes["key_heads"]
    reach = min(sizes["window"] or length, length)
    seen = reach * (reach + 1) // 2 + (length - reach) * reach
    q, k, v, grad = (values(real, 1, length, n, d) for n in (heads, key_heads, key_heads, heads))
    # Scores of the size that norms give them.
    q, k = q * d**0.25, k * d**0.25
    left = sizes["window"] - 1 if sizes["window"] else -1
    operands, settings = AttentionOperands(q, k, v, None, None), Settings(length, length, 1.0, left, 0, 0.0)
    eager = _eager_attention(q, k, v, grad, reach) if real else None
    out, lse = eager[:2] if eager else (torch.empty_like(q), torch.empty(1, heads, length))

    def call() -> Tensors:
        if kernel == "attention_forward":
            return attention_gpu.forward(operands, settings)
        return attention_gpu.backward(grad, None, operands, out, lse, settings)

    def expected() -> Tensors:
        assert eager is not None
        return eager[:2] if kernel == "attention_forward" else eager[2:]

    products, tensors = {"attention_forward": (2, 2), "attention_dkdv": (4, 4), "attention_dq": (3, 4)}[
        kernel
    ]
    own = tensors if kernel == "attention_dkdv" else 2
    moved = (2 if kernel == "attention_dkdv" else tensors) * q.numel() + own * k.numel()
    looked_up = {"head_dim": d, "same_kv": False, "window": bool(sizes["window"])}
    flop = products * 2 * heads * d * seen
    # delta is computed by a kernel of its own or, where a launch says so, by dq's: both count there.
    timed = (f"{kernel}_kernel", *(["attention_delta_kernel"] if kernel == "attention_dq" else []))
    return Problem("attention", kernel, looked_up, flop, 2 * moved, call, expected, timed)


def _eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, reach: int
) -> list[torch.Tensor]:
    """``[out, lse, dq, dk, dv]`` in float32, one head's scores at a time: those of all take gigabytes."""
    inputs = [x[0].float().transpose(0, 1).detach().requires_grad_() for x in (q, k, v)]
    results = [torch.zeros_like(x) for x in (inputs[0], *inputs)]
    out, dq, dk, dv = results
    position = torch.arange(q.shape[1])
    distance = position[:, None] - position
    hidden = (distance < 0) | (distance >= reach)
    lse = torch.empty(1, q.shape[2], q.shape[1])
    group = q.shape[2] // k.shape[2]
    for head in range(q.shape[2]):
        own = [inputs[0][head], inputs[1][head // group], inputs[2][head // group]]
        scores = (own[0] @ own[1].mT).masked_fill(hidden, float("-inf"))
        result = scores.softmax(-1) @ own[2]
        gradients = torch.autograd.grad(result, own, grad[0, :, head].float())
        out[head], lse[0, head] = result.detach(), scores.detach().logsumexp(-1)
        for total, gradient, at in zip(
            (dq, dk, dv), gradients, (head, head // group, head // group), strict=True
        ):
            total[at] += gradient
    out, dq, dk, dv = (x.detach().transpose(0, 1)[None].to(DTYPE) for x in results)
    return [out, lse, dq, dk, dv]


def _norm(part: str, sizes: Sizes, real: bool) -> Problem:
    tokens, heads, d = sizes["tokens"], sizes["heads"], sizes["head_dim"]
    x, grad, weight = (
        values(real, 1, tokens, heads, d),
        values(real, 1, tokens, heads, d),
        values(real, d) + 1,
    )
    cos, sin = (values(real, 1, tokens, d) for _ in range(2)) if sizes["rotary"] else (None, None)
    operands = NormOperands(x, weight, cos, sin, 1e-6)
    angles = 0 if cos is None else 2 * cos.numel()

    def call() -> Tensors:
        if part == "norm_forward":
            return [norm_gpu.forward(operands)]
        gradients = norm_gpu.backward(grad, operands, ("x", "weight"))
        return [gradients["x"], gradients["weight"]]

    def expected() -> Tensors:
        wide = [None if t is None else t.float() for t in (x, weight, cos, sin)]
        leaves = [t.requires_grad_() for t in wide[:2] if t is not None]
        y = rms_norm_rotary(leaves[0], leaves[1], wide[2], wide[3], 1e-6)
        return [y.detach()] if part == "norm_forward" else torch.autograd.grad(y, leaves, grad.float())

    moved = (2 if part == "norm_forward" else 3) * x.numel() + angles
    kernel = {"norm_forward": "rotary_forward", "norm_backward": "rotary_backward"}[part]
    looked_up = {
        "head_dim": d,
        "heads": heads,
        "rotated": sizes["rotary"],
        "d_weight": part == "norm_backward",
    }
    return Problem("norm_rotary", kernel, looked_up, 0, 2 * moved, call, expected)


Part = Callable[[Sizes, bool], Problem]
PARTS: Mapping[str, Part] = {
    "gate_up": _gate_up,
    "down": lambda s, real: _matmul(s, real, "hidden", "intermediate", False, False, True, weighted=True),
    "d_hidden": lambda s, real: _matmul(s, real, "hidden", "both", True, False, True),
    "quantized_up": lambda s, real: _matmul(s, real, "both", "hidden", False, True, False, quantized=True),
    "quantized_down": lambda s, real: _matmul(
        s, real, "hidden", "intermediate", False, False, True, weighted=True, quantized=True
    ),
    "quantized_d_hidden": lambda s, real: _matmul(
        s, real, "hidden", "both", True, False, True, quantized=True
    ),
    "low_rank": _low_rank,
    "outer_a": _outer_a,
    "outer_b": _outer_b,
    **{
        f"attention_{part}": lambda s, real, part=part: _attention(f"attention_{part}", s, real)
        for part in ("forward", "dkdv", "dq")
    },
    **{
        f"norm_{part}": lambda s, real, part=part: _norm(f"norm_{part}", s, real)
        for part in ("forward", "backward")
    },
}
