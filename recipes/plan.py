"""Tell from a model's configuration whether its training fits on a card, and what it takes there.

    python plan.py --model config.json --card 24GB --recipe qlora
    python plan.py --model config.json --card H100 --recipe full --cards 64 --length 8192 --png plan.png

Needs torch and transformers; no GPU, and no weights. One training step of the model runs on torch's meta device, whose
tensors have sizes and no contents, and every tensor is counted from its creation to its release. docs/planning.md says
what is counted how, and how near it came to what was measured.
"""

from __future__ import annotations

import argparse
import bisect
import io
import json
import os
import re
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import moe
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GIB = 1 << 30
# Bytes of an element: nf4 in blocks of 64 and fp8 in blocks of 128 x 128, each with a scale in float32.
FORMATS = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1 + 4 / 128**2, "nf4": 0.5 + 4 / 64}
# What ``kernel.apply_to(model, ...)`` makes run fused.
PARTS = ("attention", "mlp", "norm", "projections", "loss")


@dataclass(frozen=True)
class Card:
    """A device: GiB of memory that torch sees, dense TFLOPS in 16 bits, GB/s of its memory and of its link, one way."""

    memory: float
    tflops: float = 0
    bandwidth: float = 0
    link: float = 0


# Rates, bandwidths and links (NVLink or PCIe, one direction) as makers give them, to our knowledge, without sparsity
# and with sums in float32; memory as torch reports it, which is less than on the box.
CARDS = {
    "T4": Card(14.6, 65, 320, 16),
    "L4": Card(22.0, 121, 300, 32),
    "A10": Card(22.1, 125, 600, 32),
    "RTX3090": Card(23.6, 71, 936, 32),
    "RTX4090": Card(23.6, 165, 1008, 32),
    "RTX5090": Card(31.4, 210, 1792, 64),
    "A6000": Card(47.4, 155, 768, 32),
    "L40S": Card(44.4, 362, 864, 32),
    "A100-40": Card(39.4, 312, 1555, 300),
    "A100": Card(79.1, 312, 2039, 300),
    "H100": Card(79.1, 989, 3350, 450),
    "H200": Card(139.7, 989, 4800, 450),
    "B200": Card(178.3, 2250, 8000, 900),
    "MI300X": Card(191.5, 1307, 5300, 448),
}
# Beyond eight cards: one port of 400 Gb/s a card.
NODE, NETWORK = 8, 50.0
# What is there before the first tensor: the device's context and libraries, and with several cards the buffers of NCCL.
CONTEXT, COMMUNICATION = 0.6 * GIB, 0.5 * GIB


@dataclass(frozen=True)
class Recipe:
    """Which parameters are trained, and how each part is stored.

    Attributes:
        matrices: Format of the linear layers' and the experts' weights; all others are in the setup's dtype.
        adapters: Format of LoRA's factors; with None all of the language model is trained.
        adapted: Parts of the model whose linear layers have adapters; experts have them in any case.
        optimizer: ``adamw`` (two values a parameter in its dtype), ``adamw8bit`` (two bytes a parameter, with a scale
            for 256 of each) or ``adafactor`` (rows and columns in float32).
    """

    matrices: str
    adapters: str | None = None
    adapted: tuple[str, ...] = ("attention", "MLP")
    optimizer: str = "adamw"

    def gradient_bytes(self, parameter: Any) -> float:
        """Bytes of an element of a parameter's gradient, which is in e5m2 where the weight is in float8."""
        return 1.0 if parameter.plan_format == "fp8" else FORMATS[parameter.plan_format]

    def optimizer_bytes(self, parameter: Any) -> float:
        """Bytes that the optimizer keeps for an element of a parameter, on the average."""
        if self.optimizer == "adamw":
            return 2 * FORMATS[parameter.plan_format]
        if self.optimizer == "adamw8bit":
            return 2 * (1 + 4 / 256)
        return 4 * (1 if parameter.dim() < 2 else sum(1 / n for n in parameter.shape[-2:]))

    def update_bytes(self, parameter: Any) -> float:
        """Bytes an element that a step makes: none in fused AdamW; in Adafactor a matrix and its update in float32."""
        return 8 / (parameter.shape[0] if parameter.dim() > 2 else 1) if self.optimizer == "adafactor" else 0


# The lighter ones first.
RECIPES = {
    "qlora-8bit": Recipe("nf4", "bfloat16", ("attention",), "adamw8bit"),
    "qlora-attention": Recipe("nf4", "float32", ("attention",)),
    "qlora": Recipe("nf4", "float32"),
    "lora-16bit": Recipe("bfloat16", "bfloat16", ("attention",)),
    "lora-attention": Recipe("bfloat16", "float32", ("attention",)),
    "lora": Recipe("bfloat16", "float32"),
    "fp8": Recipe("fp8", optimizer="adafactor"),
    "full": Recipe("bfloat16"),
}


# What a configuration that does not fit together ends in, somewhere in transformers.
BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError)
BROKEN += (AssertionError, StrictDataclassError)


class PlanError(Exception):
    """Says what cannot be planned, and how to mend it."""


@dataclass(frozen=True)
class Setup:
    """How the model runs: implementations by their names in transformers, and where.

    Attributes:
        attention: ``scattermoe_flash``, ``sdpa`` or ``eager``.
        experts: ``scattermoe``, ``grouped_mm`` or ``eager``.
        parts: What runs fused, of :data:`PARTS`.
        checkpointing: Whether each layer's activations are computed again in the backward.
        rank: Of the adapters.
        accumulate: Batches whose gradients are added up for a step of the optimizer.
        dtype: Of activations and of weights that are not in a format of fewer bits.
        device: ``cuda``, or ``cpu``, where the kernels need less workspace.
    """

    attention: str = "scattermoe_flash"
    experts: str = "scattermoe"
    parts: tuple[str, ...] = PARTS
    checkpointing: bool = True
    rank: int = 16
    accumulate: int = 1
    dtype: str = "bfloat16"
    device: str = "cuda"

    def stored(self, recipe: Recipe) -> str:
        """The format of matrices: the recipe's, or the dtype where that is no format of fewer bits."""
        return recipe.matrices if recipe.matrices in ("fp8", "nf4") else self.dtype


# ---------------------------------------------------------------------------------------------- counting tensors

PHASES = ("gradients", "activations", "loss", "workspace")


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operators make, while they live, and the work that operators do.

    Attributes:
        phase: What storages made now are counted as: ``activations`` (made in the forward), ``loss`` (from the head on)
            or ``workspace`` (made in the backward); gradients of parameters become ``gradients``.
        peak: Bytes of each phase when all together were most; ``rest`` likewise, without gradients.
        work: ``(operations, bytes read and written)`` of each operator.
        history: Bytes alive by phase after each operator that made something.
        events: Bytes of each storage made, negative of each released, with a key of the storage.
    """

    current: Ledger | None = None

    def __init__(self, outside: list[torch.Tensor], granularity: int) -> None:
        super().__init__()
        self.granularity = granularity
        self.outside = {tensor.untyped_storage()._cdata for tensor in outside}
        self.live: dict[int, tuple[Any, int, str]] = {}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.rest: Counter[str] = Counter()
        self.phase = "activations"
        self.work: list[tuple[float, float]] = []
        self.history: list[tuple[int, ...]] = []
        self.events: list[tuple[int, int]] = []
        self.compressed: list[torch.Tensor] = []
        self._any: set[int] = set()

    def __enter__(self) -> Ledger:
        Ledger.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Ledger.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # transformers asks whether a mask has padding in it, or whether there is an image: no.
            return args[0].dtype == torch.bool and args[0].untyped_storage()._cdata not in self._any
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for tensor in outputs:
            if func._opname == "any":
                self._any.add(tensor.untyped_storage()._cdata)
            self.count(tensor, self.phase)
        name = func._opname
        if outputs and not (
            func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view"))
        ):
            factor = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}.get(name)
            operations = 0 if factor is None else 2 * outputs[0].numel() * args[factor].shape[-1]
            note_work(operations, *(t for t in tree_leaves(args) if isinstance(t, torch.Tensor)), *outputs)
        return result

    def count(self, tensor: torch.Tensor, phase: str) -> None:
        """Count the storage of a tensor as ``phase`` from now on, until it is released."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.outside:
            return
        if key in self.live:
            reference, size, before = self.live[key]
            self.now[before] -= size
        else:
            size = -(-storage.nbytes() // self.granularity) * self.granularity
            reference = weakref.ref(storage, lambda _: self._release(key))
            self.events.append((key, size))
        self.live[key] = (reference, size, phase)
        self.now[phase] += size
        total = self.now.total()
        if total > self.peak.total():
            self.peak = self.now.copy()
        if total - self.now["gradients"] > self.rest.total() - self.rest["gradients"]:
            self.rest = self.now.copy()
        self.history.append(tuple(self.now[name] for name in PHASES))

    def _release(self, key: int) -> None:
        _, size, phase = self.live.pop(key)
        self.now[phase] -= size
        self._any.discard(key)
        self.events.append((key, -size))


def note_work(operations: float, *tensors: torch.Tensor | None) -> None:
    """Note what one kernel does, which reads and writes ``tensors`` once."""
    if Ledger.current is not None:
        moved = sum(t.numel() * t.itemsize for t in tensors if t is not None)
        Ledger.current.work.append((operations, moved))


# ------------------------------------------------------------------- what runs in the place of kernels, on meta


def gradients_of(ctx: Any, tensors: Any, first: int = 0) -> list[torch.Tensor | None]:
    """A gradient of each tensor that needs one, the first being the operator's argument ``first``.

    A weight in float8 gets none: its gradient is compressed as it is produced, and kept in a byte an element.
    """
    gradients: list[torch.Tensor | None] = []
    for tensor, is_needed in zip(tensors, ctx.needs_input_grad[first:], strict=False):
        gradient = None
        if is_needed and getattr(tensor, "plan_format", "") == "fp8":
            assert Ledger.current is not None
            compressed = torch.empty(tensor.shape, dtype=torch.uint8, device="meta")
            Ledger.current.compressed.append(compressed)
            Ledger.current.count(compressed, "gradients")
        elif is_needed:
            gradient = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        gradients.append(gradient)
    return gradients


class Elementwise(torch.autograd.Function):
    """Our kernel's norms and gated activations, which keep their arguments and nothing else."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
        note_work(0, *tensors, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        tensors = ctx.saved_tensors
        gradients = gradients_of(ctx, tensors)
        note_work(0, *tensors, grad, *gradients)
        return tuple(gradients)


class Flash(torch.autograd.Function):
    """Attention that keeps its operands, its output and a log-sum-exp a row: ``q`` ``[B, H, S, D]``."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, window: int, mask: Any) -> torch.Tensor:
        batch, heads, rows, _ = q.shape
        out = q.new_empty((batch, rows, heads, v.shape[-1]))
        lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        keys = min(window, rows) if window else rows / 2
        ctx.operations = 2 * batch * heads * rows * keys * (q.shape[-1] + v.shape[-1])
        note_work(ctx.operations, q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, out, lse, _ = ctx.saved_tensors
        gradients = gradients_of(ctx, (q, k, v))
        delta = torch.empty_like(lse)
        note_work(2.5 * ctx.operations, q, k, v, out, grad, delta, *gradients)
        return *gradients, None, None


def flash_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Our kernel's attention, for transformers' interface."""
    return Flash.apply(query, key, value, kwargs.get("sliding_window") or 0, None), None


def sdpa_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """torch's attention, with the copies that transformers and torch make for it."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and (mask is not None or key.shape[-1] > 256):
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.empty(mask.shape, dtype=query.dtype, device=mask.device)
    return Flash.apply(query, key, value, 0, mask), None


class FusedExperts(torch.autograd.Function):
    """Our kernel's experts: keeps the gate/up projection of each token-expert pair, and nothing of a weight's size.

    ``module`` is transformers'; ``x`` ``[T, H]``, routing weights ``[T, K]``, ``up`` ``[E, 2I, H]``, ``down``
    ``[E, H, I]`` (or each transposed), and factors ``[E, r, in]``, ``[E, out, r]`` of both, or None.
    """

    @staticmethod
    def forward(ctx: Any, module: Any, x: Any, weights: Any, up: Any, down: Any, *factors: Any) -> Any:
        pairs, size = weights.numel(), x.shape[1]
        axes = (2, 1) if module.is_transposed else (1, 2)
        width, inner = up.shape[axes[0]], down.shape[axes[1]]
        hidden, *low = (
            x.new_empty((pairs, n)) for n in (width, *(0 if a is None else a.shape[1] for a in factors[::2]))
        )
        ctx.module, ctx.inner = module, inner
        ctx.operations = 2 * pairs * (width + inner) * size
        out, decoded = torch.empty_like(x), decode(up, module)
        if module.plan_setup.device == "cpu":
            columns = 2 * size + width + inner + sum(t.shape[1] for t in low)
            buffers = cpu_buffers(x, pairs, up.shape[0], max(width, size), columns, size)
        else:
            buffers = [x.new_empty((pairs, n)) for n in (inner, size)]
            note_work(0, *buffers, *buffers)
        del buffers, decoded
        note_work(ctx.operations, x, up, down, hidden, out)
        ctx.save_for_backward(x, weights, up, down, *factors, hidden, *low)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weights, up, down, *factors, hidden, low1, low2 = ctx.saved_tensors
        pairs, size, module = weights.numel(), x.shape[1], ctx.module
        ranks = low1.shape[1] + low2.shape[1]
        decoded, trained = decode(up, module), sum(ctx.needs_input_grad[3:5])
        if module.plan_setup.device == "cpu":
            own_gate = type(module)._apply_gate is not moe._default_apply_gate
            chain = ctx.inner * (9 if own_gate else 4)
            columns, wide = 2 * (hidden.shape[1] + ranks + size) + chain, max(size, chain // 2)
            buffers = cpu_buffers(x, pairs, up.shape[0], max(hidden.shape[1], size), columns, wide)
        else:
            buffers = [x.new_empty((pairs, n)) for n in (ctx.inner, ctx.inner, hidden.shape[1], ranks)]
            # The gradient of the activation is gone when those of the factors and of ``x`` are made.
            del buffers[0]
        others = gradients_of(ctx, (weights, up, down, *factors), 2)
        if module.plan_setup.device != "cpu":
            buffers.append(x.new_empty((pairs, size)))
            note_work(0, *buffers, *buffers)
        del decoded
        d_x = torch.empty_like(x)
        note_work(ctx.operations * (1 + trained / 2), x, up, down, hidden, grad)
        return None, d_x, *others


def cpu_buffers(
    x: torch.Tensor, pairs: int, experts: int, widest: int, columns: int, wide: int
) -> list[torch.Tensor]:
    """Our kernel's workspace on a CPU: rows of as many experts as fit 2 MiB, and some columns and sums in float32."""
    rows = -(-pairs // experts)
    step = max(16, (1 << rows.bit_length()) // 16)
    rows, block = -(-rows // step) * step, 1
    while 2 * block <= experts and 2 * block * rows * widest * x.itemsize <= 1 << 21:
        block *= 2
    buffers = [x.new_empty((block * rows, columns))]
    if x.itemsize < 4:
        buffers += [x.new_empty(s, dtype=torch.float32) for s in ((block * rows, wide), x.shape)]
    return buffers


def decode(stack: torch.Tensor, module: Any) -> torch.Tensor | None:
    """The workspace in which our kernel decodes a few experts of a quantized stack."""
    if module.plan_format not in ("nf4", "fp8"):
        return None
    matrix = stack.shape[1] * stack.shape[2]
    count = max(1, min(stack.shape[0] // 4, (1 << 28) // (matrix * stack.itemsize)))
    return stack.new_empty((1 if module.plan_setup.device == "cpu" else count, matrix))


def expert_weights(module: Any) -> tuple[str, str]:
    """Names of the parameters of both projections of an experts module."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def fused_experts(module: Any, x: Any, index: Any, weights: Any) -> torch.Tensor:
    """Our kernel's experts, for transformers' interface."""
    names = expert_weights(module)
    up, down = (getattr(module, name) for name in names)
    factors = [factor for name in names for factor in kernel_factors(module, name, up.dtype)]
    order = torch.empty(index.numel(), dtype=torch.long, device=index.device)
    result = FusedExperts.apply(module, x.contiguous(), weights, up, down, *factors)
    del order
    return result


def kernel_factors(module: Any, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """PEFT's factors of a parameter as the kernel takes them, copies in the weight's dtype; None without adapters."""
    a, b = (getattr(module, f"lora_{letter}_{name}", None) for letter in "ab")
    if a is None:
        return None, None
    experts = getattr(module, name).shape[0]
    columns = b.reshape(-1, experts) * 2.0
    a = a.reshape(experts, -1, a.shape[-1]).to(dtype)
    b = columns.to(dtype).t().contiguous().view(experts, b.shape[0], -1)
    return (b.mT.contiguous(), a.mT.contiguous()) if module.is_transposed else (a, b)


def merged(module: Any, name: str) -> torch.Tensor:
    """An expert stack, with PEFT's factors multiplied out and added where it has some."""
    weight = getattr(module, name)
    a, b = kernel_factors(module, name, weight.dtype)
    if a is None:
        return weight
    return torch.baddbmm(weight, *((a.mT, b.mT) if module.is_transposed else (b, a)))


def eager_experts(module: Any, x: Any, index: Any, weights: Any) -> torch.Tensor:
    """A loop over experts as transformers' eager code runs it, which keeps all its rows; in two steps."""
    pairs, experts = index.numel(), module.num_experts
    hit = torch.empty((experts + 1, *index.shape[::-1]), dtype=torch.long, device=x.device)
    out = torch.zeros_like(x)
    names = expert_weights(module)
    stacks = [merged(module, name) for name in names]
    for expert, count in ((0, pairs - pairs // 2), (min(1, experts - 1), pairs // 2)):
        token, place = (torch.empty(count, dtype=torch.long, device=x.device) for _ in range(2))
        up, down = (stack[expert] if module.is_transposed else stack[expert].t() for stack in stacks)
        rows = x[token] @ up
        if module.has_bias:
            rows = rows + getattr(module, f"{names[0]}_bias")[expert]
        rows = (module._apply_gate(rows) if module.has_gate else module.act_fn(rows)) @ down
        if module.has_bias:
            rows = rows + module.down_proj_bias[expert]
        rows = rows * weights[token, place, None]
        out.index_add_(0, token, rows.to(out.dtype))
    del hit
    return out


def merged_grouped_mm(module: Any, x: Any, index: Any, weights: Any) -> torch.Tensor:
    """transformers' own grouped_mm, with merged weights where there are adapters."""
    plain = {name: module._parameters[name] for name in expert_weights(module)}
    try:
        for name in plain:
            value = merged(module, name)
            del module._parameters[name]
            setattr(module, name, value)
        return moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, x, index, weights)
    finally:
        for name, parameter in plain.items():
            module.__dict__.pop(name, None)
            module._parameters[name] = parameter


class FusedLoss(torch.autograd.Function):
    """Our kernel's loss: makes the logits of a block of tokens at a time, and their gradients with them."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, device: str) -> torch.Tensor:
        (tokens, size), words, trained = hidden.shape, weight.shape[0], ctx.needs_input_grad[1]
        if device == "cpu":
            # Logits of a trained head are kept for a block of tokens, those of a frozen one for 1,024 words of it, too.
            rows = min(max((1 << 25) // (4 * words), 128) * 2 if trained else 1024, 1024, tokens)
            block = min(words, 1024)
            narrow = block // 2 if hidden.itemsize < 4 else 0
            widths = (words, block, 2 * size) if trained else (block, narrow, 3 * size)
        else:
            # The sum over all words is made in eight parts at once.
            rows = max(3 * (1 << 28) // (4 * words), size if trained else 0, 128) // 128 * 128
            rows = min(-(-tokens // -(-tokens // rows)) + 127, rows, tokens)
            widths = (words, 8 * size)
        buffers = [hidden.new_empty((rows, n), dtype=torch.float32) for n in widths]
        wide = [torch.empty_like(t, dtype=torch.float32) for t in (hidden, weight)[: 1 + trained]]
        note_work(2 * tokens * weight.numel() * (2 + trained), hidden, weight, *wide)
        del buffers
        ctx.device = device
        ctx.save_for_backward(hidden, weight, *(t.to(hidden.dtype) for t in wide))
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        kept = ctx.saved_tensors[2:]
        # Times the gradient of the loss, which on a CPU is seen to be 1.
        gradients = [t if ctx.device == "cpu" else torch.empty_like(t) for t in kept]
        note_work(0, *kept, *gradients)
        return gradients[0], (*gradients, None)[1], None


class QuantizedLinear(torch.autograd.Function):
    """Rows ``[T, in]`` times a frozen or float8 weight that is decoded for it, forward and backward."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        return torch.mm(rows, torch.empty_like(weight).t())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        d_rows = torch.mm(grad, torch.empty_like(weight)) if ctx.needs_input_grad[0] else None
        d_weight = None if rows is None else torch.mm(grad.t(), rows)
        del d_weight
        return d_rows, *gradients_of(ctx, (weight,), 1)


def linear_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer, quantized or not, with LoRA beside it or not: PEFT's, in PEFT's dtypes, or our kernel's."""
    rows, bias = x.reshape(-1, x.shape[-1]), module.bias
    if module.plan_format in ("nf4", "fp8"):
        result = QuantizedLinear.apply(rows, module.weight)
        result = result if bias is None else result + bias
    else:
        result = F.linear(rows, module.weight, bias)
    if hasattr(module, "lora_a"):
        a, b = module.lora_a, module.lora_b
        if "projections" in module.plan_setup.parts:
            result.addmm_(F.linear(rows, a.to(x.dtype)), (b * 2.0).to(x.dtype).t())
        else:
            result = (result + F.linear(F.linear(rows.to(a.dtype), a), b) * 2.0).to(x.dtype)
    return result.view(*x.shape[:-1], -1)


def mlp_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A gated MLP of three projections, its activation one operator."""
    return module.down_proj(Elementwise.apply(module.gate_proj(x), module.up_proj(x)))


def norm_forward(module: Any, x: torch.Tensor, *others: Any) -> torch.Tensor:
    """An RMSNorm, with a weight or without; those that take a gate run as they are."""
    return type(module).forward(module, x, *others) if others else Elementwise.apply(x, *module.parameters())


ALL_ATTENTION_FUNCTIONS.register("plan_fused", flash_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("plan_fused", lambda *_, **__: None)
ALL_ATTENTION_FUNCTIONS.register("plan_sdpa", sdpa_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("plan_sdpa", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
moe.ALL_EXPERTS_FUNCTIONS.register("plan_scattermoe", fused_experts)
moe.ALL_EXPERTS_FUNCTIONS.register("plan_eager", eager_experts)
moe.ALL_EXPERTS_FUNCTIONS.register("plan_grouped_mm", merged_grouped_mm)


# ------------------------------------------------------------------------------------------------- the model


def load_config(path: str | Path) -> Any:
    """The transformers configuration in a ``config.json``, or in a directory that has one."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as e:
        message = f"{path}: cannot be read: {e.strerror}; --model takes a model's config.json"
        raise PlanError(message) from None
    except (ValueError, RecursionError) as e:
        raise PlanError(f"{path}: is not JSON: {e}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise PlanError(f"{path}: has no model_type: is it a model's config.json?")
    # Formats are the recipe's, not the checkpoint's.
    values.pop("quantization_config", None)
    try:
        return transformers.AutoConfig.for_model(**values)
    except BROKEN as e:
        raise PlanError(
            f"{path}: transformers {transformers.__version__} does not accept this configuration "
            f"(model_type {values['model_type']!r}): {brief(e)}"
        ) from None


def brief(error: Exception) -> str:
    """The beginning of an error's message, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def build(config: Any, recipe: Recipe, setup: Setup) -> Any:
    """The model on the meta device, as the recipe trains it and the setup runs it."""
    config = type(config).from_dict(config.to_dict())
    classes = (getattr(transformers, str(name), None) for name in config.architectures or [])
    models = (c for c in classes if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel))
    make = getattr(next(models, None), "_from_config", transformers.AutoModelForCausalLM.from_config)
    # transformers looks for a library where "flash" is in the name.
    attention = {"scattermoe_flash": "plan_fused", "sdpa": "plan_sdpa"}.get(setup.attention, setup.attention)
    try:
        with torch.device("meta"):
            model = make(
                config,
                dtype=getattr(torch, setup.dtype),
                attn_implementation=attention,
                experts_implementation=f"plan_{setup.experts}",
            )
        head = model.get_output_embeddings()
    except BROKEN as e:
        raise PlanError(f"{config.model_type}: cannot be built: {brief(e)}") from None
    if head is None:
        raise PlanError(
            f"{type(model).__name__}: is not a language model with a head: nothing here trains it"
        )
    mark_parameters(model, head, recipe, setup)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PlanError(f"{type(model).__name__}: has no linear layers that PEFT's LoRA is planned for")
    replace_forwards(model, head, setup)
    return model.train()


def mark_parameters(model: Any, head: Any, recipe: Recipe, setup: Setup) -> None:
    """Freeze each parameter or not, mark it with its part and format, and give adapted modules their factors."""
    text, matrices = text_model(model), setup.stored(recipe)
    own = {id(parameter) for parameter in (*text.parameters(), *head.parameters())}
    for parameter in model.parameters():
        part = "norms and others" if id(parameter) in own else "towers"
        _mark(parameter, part, setup.dtype, trained=id(parameter) in own and not recipe.adapters)
    routers = {m.num_experts for m in text.modules() if is_experts(m)}
    for name, module in text.named_modules():
        module.plan_setup = setup
        if is_experts(module):
            for parameter in module.parameters(recurse=False):
                _mark(parameter, "experts", setup.dtype, parameter.requires_grad, of_experts=True)
            module.plan_format = matrices
            for weight in expert_weights(module):
                parameter = getattr(module, weight)
                parameter.plan_format = matrices
                if recipe.adapters:
                    count, *sizes = parameter.shape
                    _adapt(module, f"_{weight}", sizes[1], sizes[0], setup.rank, count, recipe.adapters)
        elif isinstance(module, torch.nn.Linear) and module is not head:
            part = "attention" if "att" in name else "MLP"
            is_router = module.out_features in routers
            module.plan_format = setup.dtype if is_router else matrices
            _mark(module.weight, part, module.plan_format, module.weight.requires_grad)
            if recipe.adapters and part in recipe.adapted and not is_router:
                _adapt(module, "", module.in_features, module.out_features, setup.rank, 1, recipe.adapters)
        elif isinstance(module, torch.nn.Embedding):
            module.weight.plan_part = "embeddings and head"
    for parameter in head.parameters():
        parameter.plan_part = "embeddings and head"


def _mark(parameter: Any, part: str, stored: str, trained: bool, of_experts: bool = False) -> None:
    parameter.plan_part, parameter.plan_format, parameter.plan_of_experts = part, stored, of_experts
    parameter.requires_grad_(trained)


def _adapt(module: Any, suffix: str, inputs: int, outputs: int, rank: int, experts: int, stored: str) -> None:
    """Give a module PEFT's factors of a matrix, of each expert; of a stack PEFT takes the last axis for the inputs."""
    for letter, shape in (("a", (rank * experts, inputs)), ("b", (outputs, rank * experts))):
        factor = torch.nn.Parameter(torch.empty(shape, device="meta", dtype=getattr(torch, stored)))
        _mark(factor, "adapters", stored, trained=True, of_experts=experts > 1)
        module.register_parameter(f"lora_{letter}{suffix}", factor)


def replace_forwards(model: Any, head: Any, setup: Setup) -> None:
    """Put stand-ins in the place of what does not run on the meta device, and of what the kernel runs fused."""
    parts = setup.parts
    for name, module in text_model(model).named_modules():
        if "attention" in parts and hasattr(module, "store_full_length_kv"):
            # Fused, keys and values are held by the layers that read them, and not until the step's end.
            module.store_full_length_kv &= bool(module.config.num_kv_shared_layers)
        if isinstance(module, torch.nn.Linear) and hasattr(module, "plan_format"):
            forward = linear_forward
        elif "mlp" in parts and is_mlp(module):
            forward = mlp_forward
        elif is_norm(module) and ("norm" in parts or ("attention" in parts and "attn." in name)):
            forward = norm_forward
        else:
            continue
        module.forward = types.MethodType(forward, module)
    if "loss" in parts:
        head.forward = lambda hidden: hidden
        model.loss_function = lambda logits, *_, **__: FusedLoss.apply(
            logits.reshape(-1, logits.shape[-1]), head.weight, setup.device
        )
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "final_logit_softcapping", None):
                config.final_logit_softcapping = None
    if setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def text_model(model: Any) -> Any:
    """The language model without its head, and without towers."""
    config = model.config.get_text_config()
    candidates = (
        m for m in model.modules() if isinstance(m, transformers.PreTrainedModel) and m is not model
    )
    return next((m for m in candidates if m.config is config), model.base_model)


def is_experts(module: Any) -> bool:
    """True for an experts module of transformers, whose weights are stacks."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def is_mlp(module: Any) -> bool:
    """True for a gated MLP of three projections."""
    return {name for name, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}


def is_norm(module: Any) -> bool:
    """True for a norm of rows without a bias: it has an epsilon, and at most a vector of weights."""
    has_epsilon = hasattr(module, "eps") or hasattr(module, "variance_epsilon")
    shapes = [parameter.dim() for parameter in module.parameters()]
    return has_epsilon and shapes in ([], [1]) and not hasattr(module, "bias")


# ----------------------------------------------------------------------------------------------- the allocator


def reserved(events: list[tuple[int, int]]) -> int:
    """What torch's caching allocator takes from the device for a step's ``(key, bytes)``, released where negative.

    Its rules (c10/cuda/CUDACachingAllocator): requests of up to 1 MiB come from segments of 2 MiB, those below 10 MiB
    from segments of 20 MiB, larger ones from segments of their own, rounded to 2 MiB. The smallest free block that is
    large enough serves, and is split where 512 bytes (of small segments) or more than 1 MiB are left. Neighbours join.
    """
    mib = 1 << 20
    # Free blocks by their size, of small segments and others; their sizes by their starts, and their starts by ends.
    free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    sizes: dict[int, int] = {}
    starts: dict[int, int] = {}
    used: dict[int, tuple[bool, int, int]] = {}
    total = top = 0

    def take(small: bool, start: int) -> int:
        size = sizes.pop(start)
        del starts[start + size], free[small][bisect.bisect_left(free[small], (size, start))]
        return size

    def give(small: bool, start: int, size: int) -> None:
        if start + size in sizes:
            size += take(small, start + size)
        if start in starts:
            before = starts[start]
            size, start = size + take(small, before), before
        sizes[start], starts[start + size] = size, start
        bisect.insort(free[small], (size, start))

    for key, size in events:
        if size < 0:
            give(*used.pop(key))
        elif size:
            small = size <= mib
            place = bisect.bisect_left(free[small], (size, 0))
            if place < len(free[small]):
                start = free[small][place][1]
                block = take(small, start)
            else:
                # Segments do not touch: blocks of two are no neighbours.
                block = 2 * mib if small else 20 * mib if size < 10 * mib else -(-size // (2 * mib)) * 2 * mib
                total, start, top = total + block, top, top + block + 1
            if block - size >= (512 if small else mib + 1):
                give(small, start + size, block - size)
                block = size
            used[key] = small, start, block
    return total


# ------------------------------------------------------------------------------------------------------ a step


@dataclass
class Step:
    """One training step, as counted.

    Attributes:
        peak: Bytes by phase when most was allocated. rest: The same of all but gradients.
        slack: Bytes that the allocator then held beyond.
        work, history: See :class:`Ledger`.
    """

    peak: dict[str, int]
    rest: dict[str, int]
    slack: int
    work: list[tuple[float, float]]
    history: list[tuple[int, ...]]


def trace(model: Any, batch: int, length: int, setup: Setup) -> Step:
    """Run a step (forward and backward) of ``[batch, length]`` tokens on the meta device, and count."""
    ids = torch.zeros((batch, length), dtype=torch.long, device="meta")
    outside = [ids, *model.parameters(), *model.buffers()]
    ledger = Ledger(outside, 512 if setup.device == "cuda" else 1)

    def enter_head(module: Any, args: Any) -> None:
        ledger.phase = "loss"
        if args[0].requires_grad:
            args[0].register_hook(lambda _: setattr(ledger, "phase", "workspace"))

    hooks = [model.get_output_embeddings().register_forward_pre_hook(enter_head)]
    hooks += [
        p.register_post_accumulate_grad_hook(lambda p: ledger.count(p.grad, "gradients"))
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        with ledger:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    except BROKEN as e:
        message = f"{type(model).__name__}: cannot run on the meta device: {brief(e)}"
        raise PlanError(message) from e
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    rest = {name: size for name, size in ledger.rest.items() if name != "gradients"}
    slack = reserved(ledger.events) - ledger.peak.total() if setup.device == "cuda" else 0
    return Step(dict(ledger.peak), rest, slack, ledger.work, ledger.history)


# ------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Cluster:
    """Cards among which FSDP2 splits parameters along their first dimension, experts first in ``experts`` groups."""

    cards: int = 1
    experts: int = 1

    def own(self, parameter: Any) -> float:
        """Elements of a parameter on the first card, which has the most of them."""
        rows, groups = parameter.shape[0] if parameter.dim() else 1, self.cards
        elements = parameter.numel() / rows
        if parameter.plan_of_experts:
            rows, groups = -(-rows // self.experts), self.cards // self.experts
        return -(-rows // groups) * elements

    def received(self, parameter: Any) -> float:
        """Elements that a card receives for the whole parameter, or for the experts of its group."""
        whole = parameter.numel() / (self.experts if parameter.plan_of_experts else 1)
        return max(whole - self.own(parameter), 0)


@dataclass
class Plan:
    """What a training step takes on each card, in bytes unless said otherwise.

    Attributes:
        batch, length: Tokens on each card, of each of ``setup.accumulate`` batches.
        parts: Bytes by part when most is allocated.
        peak: Their sum. capacity: What the card has, or None.
        parameters: How many there are in each part of the model. trained: How many get a gradient.
        operations: Floating-point operations of a card.
        traffic: What a card receives, by kind of exchange.
        seconds: What a step takes at least, by resource, where the card's rates are known.
        history: Bytes by phase (see ``PHASES``) after each operator.
    """

    model: str
    recipe: str
    setup: Setup
    batch: int
    length: int
    cluster: Cluster
    parts: dict[str, float]
    peak: float
    capacity: float | None
    parameters: dict[str, int]
    trained: int
    operations: float
    traffic: dict[str, float]
    seconds: dict[str, float]
    history: list[tuple[int, ...]]

    @property
    def fits(self) -> bool:
        """True if the card has the memory, or if no card is given."""
        return self.capacity is None or self.peak <= self.capacity

    @property
    def step_seconds(self) -> float:
        """The step at least: FSDP2 hides its exchanges behind the layers' work, the experts' exchange is waited for."""
        hidden = sum(self.seconds.get(name, 0) for name in ("all-gather", "reduce-scatter"))
        rest = self.seconds.get("optimizer", 0) + self.seconds.get("all-to-all", 0)
        return max(self.seconds.get("compute", 0), hidden) + rest


class Planner:
    """A model under a recipe, built once and planned for any batch, length and number of cards."""

    def __init__(self, config: Any, recipe: str = "qlora", setup: Setup | None = None) -> None:
        if recipe not in RECIPES:
            raise PlanError(f"--recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
        self.name, self.recipe, self.setup = recipe, RECIPES[recipe], setup or Setup()
        self.model = build(config, self.recipe, self.setup)
        self.text = self.model.config.get_text_config()
        self._steps: dict[tuple[int, int], Step] = {}

    def step(self, batch: int, length: int) -> Step:
        """A counted step; counted once."""
        if (batch, length) not in self._steps:
            self._steps[batch, length] = trace(self.model, batch, length, self.setup)
        return self._steps[batch, length]

    def plan(self, batch: int, length: int, card: Card | None = None, cluster: Cluster | None = None) -> Plan:
        """The plan of steps of ``[batch, length]`` tokens on each of the cards."""
        cluster = cluster or Cluster()
        step, several, times = self.step(batch, length), cluster.cards > 1, self.setup.accumulate
        parts: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        gradients = update = 0.0
        for p in self.model.parameters():
            own, part = cluster.own(p), p.plan_part
            counts[part] += p.numel()
            name = part if part == "adapters" else f"weights: {part} ({p.plan_format})"
            parts[name] += own * FORMATS[p.plan_format]
            if p.requires_grad:
                gradients += own * self.recipe.gradient_bytes(p)
                parts["optimizer"] += own * self.recipe.optimizer_bytes(p)
                update = max(update, own * self.recipe.update_bytes(p))
        gathered, traffic = self._exchanged(batch * length, cluster)
        computing: dict[str, float] = {**step.peak}
        if several or times > 1:
            # All gradients are there from the first batch on, or for the split ones of the layers before.
            computing = {**step.rest, "gradients": gradients, "gathered layers": gathered}
        updating = {"gradients": gradients, "workspace": update}
        parts.update(max(computing, updating, key=lambda phase: sum(phase.values())))
        if self.setup.device == "cuda":
            parts["allocator's slack"] = step.slack
            parts["CUDA context and libraries"] = CONTEXT + COMMUNICATION * several
        traffic = {name: times * size for name, size in traffic.items()}
        seconds = {}
        if card is not None and card.tflops and card.bandwidth:
            rate, bandwidth = card.tflops * 1e12, card.bandwidth * 1e9
            link = (card.link if cluster.cards <= NODE else min(card.link, NETWORK)) * 1e9
            seconds = {
                "compute": times * sum(max(work / rate, moved / bandwidth) for work, moved in step.work),
                "optimizer": 3 * (gradients + parts["optimizer"]) / bandwidth,
                **{name: size / link for name, size in traffic.items() if link},
            }
        return Plan(
            type(self.model).__name__, self.name, self.setup, batch, length, cluster,
            parts={name: size for name, size in parts.items() if size},
            peak=parts.total(),
            capacity=None if card is None else card.memory * GIB,
            parameters=dict(counts),
            trained=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            operations=times * sum(operations for operations, _ in step.work),
            traffic=traffic,
            seconds=seconds,
            history=step.history,
        )  # fmt: skip

    def _exchanged(self, tokens: int, cluster: Cluster) -> tuple[float, dict[str, float]]:
        """What is gathered at a time beyond a card's own, and what a card receives in a batch by kind of exchange.

        That is two layers (FSDP2 gathers one ahead), one's gradients before they are split, and what no layer has.
        """
        gathered: Counter[str] = Counter()
        traffic: Counter[str] = Counter()
        for name, p in self.model.named_parameters():
            stack, dot, rest = name.partition(".layers.")
            elements = cluster.received(p)
            # A layer is gathered again for the backward.
            weights = elements * FORMATS[p.plan_format] * (2 if dot else 1)
            gradients = elements * self.recipe.gradient_bytes(p) * p.requires_grad
            gathered[f"{stack}.{rest.split('.')[0]}" if dot else ""] += weights + gradients
            traffic.update({"all-gather": weights, "reduce-scatter": gradients})
        if cluster.experts > 1:
            layers = sum(is_experts(module) for module in self.model.modules())
            names = ("num_experts_per_tok", "top_k_experts")
            chosen = next(filter(None, (getattr(self.text, name, None) for name in names)), 1)
            # There and back, in the forward, in its repetition and in the backward.
            rows = 2 * (2 + self.setup.checkpointing) * tokens * chosen * (1 - 1 / cluster.experts)
            traffic["all-to-all"] = layers * rows * self.text.hidden_size * FORMATS[self.setup.dtype]
        others = gathered.pop("", 0)
        return others + max(gathered.values(), default=0), {name: n for name, n in traffic.items() if n}


def largest(plan: Callable[[int], Plan], start: int, unit: int, limit: int) -> int:
    """The largest multiple of ``unit`` up to ``limit`` whose plan fits, found in a few trials; 0 if none does.

    Args:
        plan: Makes the plan for a number; its peak grows nearly linearly.
        start: The number to try first.
    """
    low, high, peaks = 0, limit + 1, {}
    trial = min(max(start // unit * unit, unit), limit)
    for count in range(12):
        result = plan(trial)
        assert result.capacity is not None
        peaks[trial] = result.peak
        low, high = (trial, high) if result.fits else (low, trial)
        if high - low <= max(unit, low // 64):
            break
        if low in peaks and high in peaks and count % 3:
            share = (result.capacity - peaks[low]) / (peaks[high] - peaks[low])
            trial = round(low + share * (high - low))
        else:
            trial = 2 * low if high > limit else (low + high) // 2
        trial = min(max(trial // unit * unit, low + unit), high - 1)
    return low


# ------------------------------------------------------------------------------------------------- the command


def parse_card(text: str) -> Card:
    """A card of ``CARDS`` by its name, or one of which only the memory is known: ``24GB``."""
    name = text.upper().replace(" ", "").replace("_", "-")
    if name in CARDS:
        return CARDS[name]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(GB|GIB)", name)
    if match is None or not float(match[1]):
        raise PlanError(f"--card: expected memory such as 24GB or one of {', '.join(CARDS)}, got {text!r}")
    return Card(float(match[1]) * (1e9 / GIB if match[2] == "GB" else 1))


def show(plan: Plan, card: str) -> str:
    """The plan as a table."""
    cards = f"each of {plan.cluster.cards} {card}" if plan.cluster.cards > 1 else card
    counts = ", ".join(f"{part} {n / 1e9:.2f}" for part, n in plan.parameters.items())
    total = sum(n for part, n in plan.parameters.items() if part != "adapters")
    width = max(map(len, plan.parts))
    lines = [
        f"{plan.model}, {plan.recipe}: {plan.batch} x {plan.length:,} tokens on {cards}",
        f"{total / 1e9:.2f} billion parameters ({counts}), of which {plan.trained / 1e9:.3f} are trained",
        "",
    ]
    for part, size in plan.parts.items():
        lines.append(f"  {part:{width}} {size / GIB:9.3f} GiB  {'#' * round(40 * size / plan.peak)}".rstrip())
    lines.append(f"  {'at the peak':{width}} {plan.peak / GIB:9.3f} GiB")
    if plan.capacity is not None:
        verdict = "fits, and leaves" if plan.fits else "does not fit, by"
        spare = abs(plan.capacity - plan.peak) / GIB
        lines.append(f"  {'on the card':{width}} {plan.capacity / GIB:9.3f} GiB  {verdict} {spare:.1f} GiB")
    lines += ["", f"A step is {plan.operations / 1e12:,.1f} TFLOP on each card."]
    if plan.traffic:
        kinds = ", ".join(f"{n / GIB:.2f} GiB by {kind}" for kind, n in plan.traffic.items())
        lines.append(f"A card receives {kinds}.")
    if plan.seconds:
        tokens = plan.batch * plan.length * plan.setup.accumulate * plan.cluster.cards / plan.step_seconds
        by = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in plan.seconds.items())
        lines.append(
            f"By the roof it takes {plan.step_seconds:.3f} s at least, {tokens:,.0f} tokens a second: {by}."
        )
    return "\n".join(lines)


def draw(plan: Plan, card: str) -> bytes:
    """A picture of the parts, and of the step's memory over time, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 6), height_ratios=[2, 3], layout="constrained")
    left = 0.0
    for part, size in plan.parts.items():
        top.barh([0], [size / GIB], left=left, label=part)
        left += size / GIB
    if plan.capacity is not None:
        top.axvline(plan.capacity / GIB, color="black", linestyle="--", label=card)
    title = f"{plan.model}, {plan.recipe}, {plan.batch} x {plan.length:,} tokens"
    top.set(yticks=[], xlabel="GiB", title=title)
    top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=3, fontsize=7)
    rows = plan.history[:: max(1, len(plan.history) // 4000)]
    curves = ([size / GIB for size in column] for column in zip(*rows, strict=True))
    bottom.stackplot(range(len(rows)), *curves, labels=PHASES)
    bottom.set(xticks=[], xlabel="one step: forward, then backward", ylabel="GiB made by the step")
    bottom.legend(fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def write(path: str, content: bytes) -> None:
    """Write a file, or nothing."""
    temporary = Path(f"{path}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise PlanError(f"{path}: cannot be written: {e.strerror}") from None


def advice(planner: Planner, config: Any, plan: Plan, card: Card) -> str:
    """What would fit where a plan does not."""
    batch, length, cluster, options = plan.batch, plan.length, plan.cluster, []
    shorter = largest(lambda n: planner.plan(1, n, card, cluster), length // 2, 128, batch * length)
    if shorter:
        options.append(f"--batch 1 --length {shorter}")
    names = list(RECIPES)
    for name in reversed(names[: names.index(plan.recipe)]):
        if Planner(config, name, plan.setup).plan(batch, length, card, cluster).fits:
            options.append(f"--recipe {name}")
            break
    cards = cluster.cards * 2
    while cards <= 1024:
        if planner.plan(batch, length, card, Cluster(cards, cluster.experts)).fits:
            options.append(f"--cards {cards}")
            break
        cards *= 2
    fitting = (
        f"what would fit: {', or '.join(options)}"
        if options
        else "no length, recipe or number of cards would"
    )
    return f"does not fit: {plan.peak / GIB:.1f} GiB of {card.memory:.1f} GiB; {fitting}"


def main() -> None:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="config.json, or a directory that has one")
    add("--card", required=True, help=f"memory such as 24GB, or one of {', '.join(CARDS)}")
    add("--recipe", default="qlora", help=", ".join(RECIPES))
    add("--batch", type=int, default=1, help="rows on each card")
    add("--length", type=int, default=2048, help="tokens in a row")
    add("--accumulate", type=int, default=1, help="batches for a step of the optimizer")
    add("--cards", type=int, default=1, help="1 to 1024, by FSDP2")
    add("--expert-parallel", type=int, default=1, help="cards among which experts are divided")
    add("--rank", type=int, default=16, help="of the adapters")
    add("--attention", choices=["scattermoe_flash", "sdpa", "eager"], default="scattermoe_flash")
    add("--experts", choices=["scattermoe", "grouped_mm", "eager"], default="scattermoe")
    add("--parts", nargs="*", choices=PARTS, default=PARTS, help="what kernel.apply_to makes run fused; all")
    add("--no-checkpointing", action="store_true", help="keep all activations")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of activations")
    add("--cpu", action="store_true", help="the card is a computer's memory")
    add("--tflops", type=float, help="the card's dense rate in 16 bits")
    add("--bandwidth", type=float, help="of its memory, GB/s")
    add("--link", type=float, help="to other cards, GB/s in one direction")
    add("--json", help="write the plan to this file")
    add("--png", help="draw the plan into this file")
    try:
        run(parser.parse_args())
    except PlanError as e:
        sys.exit(f"plan: {e}")


def run(args: argparse.Namespace) -> None:
    """Plan, print, write and draw what the arguments say."""
    rates = {name: getattr(args, name) for name in ("tflops", "bandwidth", "link")}
    card = replace(parse_card(args.card), **{name: rate for name, rate in rates.items() if rate is not None})
    for name, rate in rates.items():
        if rate is not None and not 0 < rate < float("inf"):
            raise PlanError(f"--{name}: expected a number above 0, got {rate:g}")
    for name in ("batch", "length", "accumulate", "cards", "expert_parallel", "rank"):
        if getattr(args, name) < 1:
            raise PlanError(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(args, name)}")
    if args.cards > 1024 or args.cards % args.expert_parallel:
        raise PlanError(f"--cards: expected at most 1024, a multiple of --expert-parallel, got {args.cards}")
    for path in filter(None, (args.json, args.png)):
        if not Path(path).absolute().parent.is_dir():
            raise PlanError(f"{path}: cannot be written: there is no such directory")
    if args.png and find_spec("matplotlib") is None:
        raise PlanError("--png: needs matplotlib: pip install matplotlib")
    cluster = Cluster(args.cards, args.expert_parallel)
    setup = Setup(
        args.attention, args.experts, tuple(args.parts), not args.no_checkpointing, args.rank,
        args.accumulate, args.dtype, device="cpu" if args.cpu else "cuda",
    )  # fmt: skip
    config = load_config(args.model)
    planner = Planner(config, args.recipe, setup)
    for count in {module.num_experts for module in planner.model.modules() if is_experts(module)}:
        if count % cluster.experts:
            raise PlanError(
                f"--expert-parallel: expected a divisor of {count} experts, got {cluster.experts}"
            )
    plan = planner.plan(args.batch, args.length, card, cluster)
    print(show(plan, args.card))
    if plan.fits:
        limit = getattr(planner.text, "max_position_embeddings", None) or 1 << 20
        length = largest(lambda n: planner.plan(args.batch, n, card, cluster), args.length, 128, limit)
        batch = largest(lambda n: planner.plan(n, args.length, card, cluster), args.batch, 1, 4096)
        print(
            f"The longest rows at this batch: {length:,} tokens. The largest batch at this length: {batch:,}."
        )
        for words, change in (
            ("Without checkpointing", {"checkpointing": False}),
            ("With all logits in memory", {"parts": tuple(part for part in setup.parts if part != "loss")}),
        ):
            other = Planner(config, args.recipe, replace(setup, **change))
            peak = other.plan(args.batch, args.length, card, cluster).peak
            print(f"{words}: {peak / GIB:.3f} GiB at the peak.")
    if args.json:
        values = {"fits": plan.fits, "step_seconds": plan.step_seconds, **asdict(plan)}
        del values["history"]
        write(args.json, (json.dumps(values, indent=2) + "\n").encode())
    if args.png:
        write(args.png, draw(plan, args.card))
    if not plan.fits:
        raise PlanError(advice(planner, config, plan, card))


if __name__ == "__main__":
    main()
