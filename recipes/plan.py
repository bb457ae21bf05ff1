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
import contextlib
import json
import os
import re
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import moe
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GIB = 1 << 30
# Bytes of an element: nf4 in blocks of 64 and fp8 in blocks of 128 x 128, each with a scale in float32.
FORMATS = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1 + 4 / 128**2, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Card:
    """A device: GiB of memory that torch sees, dense TFLOPS in 16 bits, GB/s of its memory and of its link, one way."""

    memory: float
    tflops: float
    bandwidth: float
    link: float


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
        matrices: Format of the linear layers' and the experts' weights; all others are in ``bfloat16``.
        adapters: Format of LoRA's factors; with None all of the language model is trained.
        adapted: Parts of the model whose linear layers have adapters; experts have them in any case.
        optimizer: ``adamw`` (two values a parameter in its dtype), ``adamw8bit`` (two bytes a parameter, with a scale
            for 256 of each) or ``adafactor`` (rows and columns in float32).
        gradient: Bytes of a gradient's element where the weight has the format ``matrices``.
    """

    matrices: str
    adapters: str | None
    adapted: tuple[str, ...] = ("attention", "MLP")
    optimizer: str = "adamw"
    gradient: float = 2.0


RECIPES = {
    # As the scripts beside this file have it; in the next two the adapters are as PEFT makes them of itself.
    "qlora-8bit": Recipe("nf4", "bfloat16", ("attention",), "adamw8bit"),
    "qlora": Recipe("nf4", "float32"),
    "lora": Recipe("bfloat16", "float32"),
    "fp8": Recipe("fp8", None, optimizer="adafactor", gradient=1.0),
    "full": Recipe("bfloat16", None),
}


class PlanError(Exception):
    """Says what cannot be planned, and how to mend it."""


@dataclass(frozen=True)
class Setup:
    """How the model runs: implementations by their names in transformers, and where.

    Attributes:
        attention: ``scattermoe_flash``, ``sdpa`` or ``eager``.
        experts: ``scattermoe``, ``grouped_mm`` or ``eager``.
        fused_loss: Whether the loss is taken without logits.
        checkpointing: Whether each layer's activations are computed again in the backward.
        rank: Of the adapters.
        dtype: Of activations and of weights that are not in a format of fewer bits.
        device: ``cuda``, or ``cpu``, where the kernels need less workspace.
    """

    attention: str = "scattermoe_flash"
    experts: str = "scattermoe"
    fused_loss: bool = True
    checkpointing: bool = True
    rank: int = 16
    dtype: str = "bfloat16"
    device: str = "cuda"


# ---------------------------------------------------------------------------------------------- counting tensors


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operators make, while they live, and the work that operators do.

    Attributes:
        phase: What storages made now are counted as: ``activations`` (made in the forward), ``loss`` (from the head on)
            or ``workspace`` (made in the backward); gradients of parameters become ``gradients``.
        peak: Bytes of each phase when all together were most; ``rest`` likewise, without gradients.
        work: ``(operations, bytes read and written)`` of each operator.
        history: Bytes alive by phase after each operator that made something.
    """

    current: Ledger | None = None

    def __init__(self, model: torch.nn.Module, granularity: int) -> None:
        super().__init__()
        self.granularity = granularity
        self.outside = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        self.live: dict[int, tuple[Any, int, str]] = {}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.rest: Counter[str] = Counter()
        self.phase = "activations"
        self.work: list[tuple[float, float]] = []
        self.history: list[tuple[int, ...]] = []
        self.events: list[tuple[int, int]] = []
        self._any: set[int] = set()

    def __enter__(self) -> Ledger:
        Ledger.current = self
        return super().__enter__()

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
        self._note_work(func, args, outputs)
        return result

    def count(self, tensor: torch.Tensor, phase: str) -> None:
        """Count the storage of a tensor as ``phase`` from now on, until it is released."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.outside:
            return
        if key in self.live:
            reference, size, old = self.live[key]
            self.now[old] -= size
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

    def _note_work(self, func: Any, args: Any, outputs: list[torch.Tensor]) -> None:
        name = func._opname
        if (
            func.is_view
            or name.startswith(("empty", "new_empty", "detach", "_unsafe_view", "t"))
            or not outputs
        ):
            return
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        moved = sum(t.numel() * t.itemsize for t in (*tensors, *outputs))
        inner = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(name)
        operations = 0 if inner is None else 2 * outputs[0].numel() * args[inner].shape[-1]
        self.work.append((operations, moved))


PHASES = ("gradients", "activations", "loss", "workspace")


def note_work(operations: float, *tensors: torch.Tensor | None) -> None:
    """Note what one fused kernel does, which reads and writes ``tensors`` once."""
    if Ledger.current is not None:
        moved = sum(t.numel() * t.itemsize for t in tensors if t is not None)
        Ledger.current.work.append((operations, moved))


# ------------------------------------------------------------------- what runs in the place of kernels, on meta


class Flash(torch.autograd.Function):
    """Attention that keeps its operands, its output and a log-sum-exp a row: ``q`` ``[B, H, S, D]``."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, window: int, mask: Any) -> torch.Tensor:
        batch, heads, rows, _ = q.shape
        # A copy where a row's elements are apart, as kernels read whole rows.
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
        gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
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


@dataclass(frozen=True)
class _Sizes:
    """What a fused experts layer needs beside its tensors."""

    transposed: bool
    own_gate: bool
    format: str
    device: str


class FusedExperts(torch.autograd.Function):
    """Our kernel's experts: keeps the gate/up projection of each token-expert pair, and nothing of a weight's size.

    ``x`` ``[T, H]``, routing weights ``[T, K]``, ``up`` ``[E, 2I, H]``, ``down`` ``[E, H, I]`` (or each transposed),
    and factors ``[E, r, in]``, ``[E, out, r]`` of both, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, sizes: _Sizes, x: Any, weights: Any, up: Any, down: Any, *factors: Any
    ) -> torch.Tensor:
        pairs = weights.numel()
        width, inner = (up.shape[2], down.shape[1]) if sizes.transposed else (up.shape[1], down.shape[2])
        ranks = [0 if a is None else a.shape[1] for a in factors[::2]]
        hidden, low1, low2 = (x.new_empty((pairs, n)) for n in (width, *ranks))
        ctx.sizes, ctx.inner = sizes, inner
        ctx.operations = 2 * pairs * (width + inner) * x.shape[1]
        out = x.new_empty(x.shape)
        decoded, widest = decode(up, sizes), max(width, x.shape[1])
        if sizes.device == "cpu":
            buffers = cpu_buffers(x, pairs, up.shape[0], widest, 2 * x.shape[1] + width + inner + sum(ranks))
        else:
            buffers = [x.new_empty((pairs, n)) for n in (inner, x.shape[1])]
            note_work(0, *buffers, *buffers)
        del buffers
        del decoded
        note_work(ctx.operations, x, up, down, hidden, out)
        ctx.save_for_backward(x, weights, up, down, *factors, hidden, low1, low2)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weights, up, down, *factors, hidden, low1, low2 = ctx.saved_tensors
        needs = ctx.needs_input_grad
        pairs = weights.numel()
        trained = [t for t, need in zip((up, down), needs[3:5], strict=True) if need]
        decoded, columns = (
            decode(up, ctx.sizes),
            2 * hidden.shape[1] + ctx.inner * (9 if ctx.sizes.own_gate else 4),
        )
        low = low1.shape[1] + low2.shape[1]
        if ctx.sizes.device == "cpu":
            buffers = cpu_buffers(
                x, pairs, up.shape[0], max(hidden.shape[1], x.shape[1]), columns + 2 * low + 2 * x.shape[1]
            )
        else:
            sizes = (ctx.inner, ctx.inner, hidden.shape[1], low, x.shape[1])
            buffers = [x.new_empty((pairs, n)) for n in sizes]
            note_work(0, *buffers, *buffers)
        gradients = [
            torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
            for t, need in zip((x, weights, up, down, *factors), needs[1:], strict=True)
        ]
        note_work(ctx.operations * (1 + len(trained) / 2), x, up, down, hidden, grad, *trained)
        del decoded, buffers
        return None, *gradients


def cpu_buffers(x: torch.Tensor, pairs: int, experts: int, widest: int, columns: int) -> list[torch.Tensor]:
    """Our kernel's workspace on a CPU: rows of as many experts as fit 2 MiB, and sums of ``x`` in float32."""
    rows = -(-pairs // experts)
    step = max(16, (1 << rows.bit_length()) // 16)
    rows, block = -(-rows // step) * step, 1
    while 2 * block <= experts and 2 * block * rows * widest * x.itemsize <= 1 << 21:
        block *= 2
    experts = block
    buffers = [x.new_empty((experts * rows, columns))]
    if x.itemsize < 4:
        buffers += [x.new_empty((n, x.shape[1]), dtype=torch.float32) for n in (experts * rows, x.shape[0])]
    return buffers


def decode(stack: torch.Tensor, sizes: _Sizes) -> torch.Tensor | None:
    """The workspace in which our kernel decodes a few experts of a quantized stack."""
    if sizes.format == "bfloat16":
        return None
    matrix = stack.shape[1] * stack.shape[2]
    count = max(1, min(stack.shape[0] // 8, (1 << 27) // (matrix * stack.itemsize)))
    return stack.new_empty((1 if sizes.device == "cpu" else count, matrix))


def expert_weights(module: Any) -> tuple[str, str]:
    """Names of the parameters of both projections of an experts module."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def fused_experts(module: Any, x: Any, index: Any, weights: Any) -> torch.Tensor:
    """Our kernel's experts, for transformers' interface."""
    own_gate = type(module)._apply_gate is not moe._default_apply_gate
    sizes = _Sizes(module.is_transposed, own_gate, module.plan_format, module.plan_setup.device)
    names = expert_weights(module)
    up, down = (getattr(module, name) for name in names)
    factors = [factor for name in names for factor in kernel_factors(module, name, up.dtype)]
    order = torch.empty(index.numel(), dtype=torch.long, device=index.device)
    result = FusedExperts.apply(sizes, x.contiguous(), weights, up, down, *factors)
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


def eager_experts(module: Any, x: Any, index: Any, weights: Any) -> torch.Tensor:
    """A loop over experts as transformers' eager code runs it, which keeps all its rows; in two steps."""
    pairs, experts = index.numel(), module.num_experts
    hit = torch.empty((experts + 1, *index.shape[::-1]), dtype=torch.long, device=x.device)
    out = torch.zeros_like(x)
    names = expert_weights(module)
    stacks = [merged(module, name) for name in names]
    for expert, count in ((0, pairs - pairs // 2), (min(1, experts - 1), pairs // 2)):
        token, place = (torch.empty(count, dtype=torch.long, device=x.device) for _ in range(2))
        up, down = (stack[expert] for stack in stacks)
        if not module.is_transposed:
            up, down = up.t(), down.t()
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


def merged(module: Any, name: str) -> torch.Tensor:
    """An expert stack, with PEFT's factors multiplied out and added where it has some."""
    weight = getattr(module, name)
    a, b = kernel_factors(module, name, weight.dtype)
    return weight if a is None else torch.baddbmm(weight, b, a)


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
    """Our kernel's loss: keeps a log-sum-exp for each token, and makes a part of the logits at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, device: str) -> torch.Tensor:
        tokens, words = hidden.shape[0], weight.shape[0]
        frozen = not ctx.needs_input_grad[1]
        lse = hidden.new_empty((2, tokens), dtype=torch.float32)
        pull = hidden.new_empty(hidden.shape if device == "cpu" and frozen else (0,))
        if device == "cpu":
            words, wide_rows = min(words, 1024), 3 * tokens if frozen else tokens
            logits = hidden.new_empty((min(tokens, 1024), words), dtype=torch.float32)
            narrow = torch.empty_like(logits, dtype=hidden.dtype) if hidden.itemsize < 4 else None
            wide = hidden.new_empty((wide_rows, hidden.shape[1]), dtype=torch.float32)
            del logits, narrow, wide
        else:
            by_tile = hidden.new_empty((-(-words // 128), tokens), dtype=torch.float32)
            del by_tile
        ctx.device = device
        ctx.save_for_backward(hidden, weight, lse, pull)
        ctx.operations = 2 * tokens * weight.numel()
        note_work(ctx.operations, hidden, weight)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden, weight, _, pull = ctx.saved_tensors
        wide = hidden.new_empty(hidden.shape, dtype=torch.float32)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if pull.shape == hidden.shape:
            note_work(0, wide, pull)
        else:
            columns = min(
                max((1 << 28) // (128 * hidden.shape[0] * hidden.itemsize), 1) * 128, weight.shape[0]
            )
            if ctx.device == "cpu":
                words = min(weight.shape[0], 1024)
                part = hidden.new_empty(
                    (2 * min(hidden.shape[0], 1024) + hidden.shape[1], words), dtype=torch.float32
                )
            else:
                part = hidden.new_empty((hidden.shape[0], columns)), torch.empty_like(wide)
            note_work(ctx.operations * (2 if d_weight is None else 3), hidden, weight, d_weight)
            del part
        return wide.to(hidden.dtype), d_weight, None


class QuantizedLinear(torch.autograd.Function):
    """A product with a frozen or float8 weight that is decoded for it, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        dense = torch.empty_like(weight)
        return torch.mm(x.reshape(-1, x.shape[-1]), dense.t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dense = torch.empty_like(weight)
        dx = torch.mm(rows, dense).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        del dense
        return dx, None if x is None else torch.mm(rows.t(), x.reshape(-1, x.shape[-1]))


def linear_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer, quantized or not, with PEFT's LoRA beside it or not, in PEFT's dtypes."""
    weight, bias = module.weight, module.bias
    if module.plan_format in ("nf4", "fp8"):
        result = QuantizedLinear.apply(x, weight)
        result = result if bias is None else result + bias
    else:
        result = F.linear(x, weight, bias)
    if hasattr(module, "lora_a"):
        wide = x.to(module.lora_a.dtype)
        low = F.linear(F.linear(wide, module.lora_a), module.lora_b)
        result = (result + low * 2.0).to(x.dtype)
    return result


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
        raise PlanError(
            f"{path}: cannot be read: {e.strerror}; --model takes a model's config.json"
        ) from None
    except ValueError as e:
        raise PlanError(f"{path}: is not JSON: {e}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise PlanError(f"{path}: has no model_type: is it a model's config.json?")
    # Formats are the recipe's, not the checkpoint's.
    values.pop("quantization_config", None)
    try:
        return transformers.AutoConfig.for_model(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        reason = str(e).splitlines()[0][:200]
        raise PlanError(
            f"{path}: transformers {transformers.__version__} does not know this configuration "
            f"(model_type {values['model_type']!r}): {reason}"
        ) from None


def build(config: Any, recipe: Recipe, setup: Setup) -> Any:
    """The model on the meta device, as the recipe trains it and the setup runs it."""
    config = type(config).from_dict(config.to_dict())
    names = config.architectures or []
    model_class = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    # transformers looks for a library where "flash" is in the name.
    attention = {"scattermoe_flash": "plan_fused", "sdpa": "plan_sdpa"}.get(setup.attention, setup.attention)
    settings = {
        "dtype": getattr(torch, setup.dtype),
        "attn_implementation": attention,
        "experts_implementation": f"plan_{setup.experts}",
    }
    try:
        with torch.device("meta"):
            if model_class is not None:
                model = model_class._from_config(config, **settings)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, **settings)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as e:
        raise PlanError(f"{config.model_type}: cannot be built: {str(e).splitlines()[0][:200]}") from None
    head = model.get_output_embeddings()
    if head is None:
        raise PlanError(
            f"{type(model).__name__}: is not a language model with a head: nothing here trains it"
        )
    _prepare(model, head, recipe, setup)
    return model.train()


def _prepare(model: Any, head: Any, recipe: Recipe, setup: Setup) -> None:
    """Mark each parameter with its part and format; freeze it, adapt its module and put stand-ins in place."""
    text = text_model(model)
    for parameter in model.parameters():
        parameter.plan_part, parameter.plan_format = "towers", setup.dtype
        parameter.plan_of_experts = False
        parameter.requires_grad_(False)
    for parameter in [*text.parameters(), *head.parameters()]:
        parameter.plan_part = "norms and others"
        parameter.requires_grad_(not recipe.adapters)
    experts_count = {m.num_experts for m in text.modules() if is_experts(m)}
    for name, module in text.named_modules():
        if is_experts(module):
            module.plan_setup, module.plan_format = setup, stored_format(recipe, setup)
            for weight in expert_weights(module):
                parameter = getattr(module, weight)
                parameter.plan_format = module.plan_format
                if recipe.adapters:
                    shape = parameter.shape
                    _adapt(module, f"_{weight}", shape[1:], setup.rank, shape[0], recipe.adapters)
            for parameter in module.parameters(recurse=False):
                if not hasattr(parameter, "plan_part") or parameter.plan_part != "adapters":
                    parameter.plan_part, parameter.plan_of_experts = "experts", True
        elif isinstance(module, torch.nn.Linear) and module is not head:
            parts = {"attention" if "att" in part else "MLP" for part in name.split(".")}
            module.weight.plan_part = "attention" if "attention" in parts else "MLP"
            if module.out_features in experts_count:
                continue
            module.weight.plan_format = module.plan_format = stored_format(recipe, setup)
            if recipe.adapters and module.weight.plan_part in recipe.adapted:
                _adapt(module, "", module.weight.shape[::-1], setup.rank, 1, recipe.adapters)
            module.forward = types.MethodType(linear_forward, module)
        elif isinstance(module, torch.nn.Embedding):
            module.weight.plan_part = "embeddings and head"
    for parameter in head.parameters():
        parameter.plan_part = "embeddings and head"
    if setup.fused_loss:
        head.forward = lambda hidden: hidden
        model.loss_function = lambda logits, *_, **__: FusedLoss.apply(
            logits.reshape(-1, logits.shape[-1]), head.weight, setup.device
        )
        for part in (model.config, model.config.get_text_config()):
            if getattr(part, "final_logit_softcapping", None):
                part.final_logit_softcapping = None
    if setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def stored_format(recipe: Recipe, setup: Setup) -> str:
    """The format of matrices: the recipe's, or the setup's dtype where that is no format of fewer bits."""
    return setup.dtype if recipe.matrices == "bfloat16" else recipe.matrices


def text_model(model: Any) -> Any:
    """The language model without its head, and without towers."""
    config = model.config.get_text_config()
    candidates = [
        m for m in model.modules() if isinstance(m, transformers.PreTrainedModel) and m is not model
    ]
    return next((m for m in candidates if m.config is config), model.base_model)


def is_experts(module: Any) -> bool:
    """True for an experts module of transformers, whose weights are stacks."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _adapt(module: Any, suffix: str, sizes: tuple[int, int], rank: int, experts: int, dtype: str) -> None:
    """Give a module PEFT's factors of a matrix ``sizes`` (in PEFT's order), of each expert."""
    for letter, shape in (
        ("a", (rank * experts, sizes[-1 if suffix else 0])),
        ("b", (sizes[0 if suffix else 1], rank * experts)),
    ):
        parameter = torch.nn.Parameter(torch.empty(shape, device="meta", dtype=getattr(torch, dtype)))
        parameter.plan_part, parameter.plan_format = "adapters", dtype
        parameter.plan_of_experts = experts > 1
        module.register_parameter(f"lora_{letter}{suffix}", parameter)


def reserved(events: list[tuple[int, int]]) -> int:
    """What torch's caching allocator takes from the device for a step's ``(key, bytes)``, released where negative.

    Its rules (c10/cuda/CUDACachingAllocator): requests of up to 1 MiB come from segments of 2 MiB, those below 10 MiB
    from segments of 20 MiB, larger ones from segments of their own, rounded to 2 MiB. The smallest free block that is
    large enough serves, and is split where 512 bytes (of small segments) or more than 1 MiB are left. Neighbours join.
    """
    mib = 1 << 20
    # Blocks: [pool, size, previous, next, is_free]; free ones by pool, sorted by size.
    free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    blocks: dict[int, list[Any]] = {}
    used: dict[int, int] = {}
    total = count = 0

    def insert(block: int) -> None:
        bisect.insort(free[blocks[block][0]], (blocks[block][1], block))
        blocks[block][4] = True

    def remove(block: int) -> None:
        pool = free[blocks[block][0]]
        pool.pop(bisect.bisect_left(pool, (blocks[block][1], block)))
        blocks[block][4] = False

    def join(first: int, second: int) -> None:
        blocks[first][1] += blocks[second][1]
        after = blocks[first][3] = blocks.pop(second)[3]
        if after is not None:
            blocks[after][2] = first

    for key, size in events:
        if size > 0:
            small = size <= mib
            at = bisect.bisect_left(free[small], (size, 0))
            if at < len(free[small]):
                block = free[small][at][1]
                remove(block)
            else:
                segment = (
                    2 * mib if small else 20 * mib if size < 10 * mib else -(-size // (2 * mib)) * 2 * mib
                )
                total, count, block = total + segment, count + 1, count
                blocks[block] = [small, segment, None, None, False]
            left = blocks[block][1] - size
            if left >= 512 if small else left > mib:
                after, rest, count = blocks[block][3], count, count + 1
                blocks[rest] = [small, left, block, after, False]
                blocks[block][1], blocks[block][3] = size, rest
                if after is not None:
                    blocks[after][2] = rest
                insert(rest)
            used[key] = block
        elif size < 0:
            block = used.pop(key)
            before, after = blocks[block][2:4]
            if after is not None and blocks[after][4]:
                remove(after)
                join(block, after)
            if before is not None and blocks[before][4]:
                remove(before)
                join(before, block)
                block = before
            insert(block)
    return total


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


def trace(model: Any, batch: int, length: int, setup: Setup, recipe: Recipe) -> Step:
    """Run a step (forward and backward) of ``[batch, length]`` tokens on the meta device, and count."""
    ids = torch.zeros((batch, length), dtype=torch.long, device="meta")
    ledger = Ledger(model, 512 if setup.device == "cuda" else 1)
    ledger.outside.add(ids.untyped_storage()._cdata)
    head = model.get_output_embeddings()
    gradient = recipe.gradient if stored_format(recipe, setup) == "fp8" else None

    def enter_head(module: Any, args: Any) -> None:
        ledger.phase = "loss"
        if args[0].requires_grad:
            args[0].register_hook(lambda _: setattr(ledger, "phase", "workspace"))

    def keep_gradient(parameter: Any) -> None:
        if gradient is not None and parameter.plan_format == "fp8":
            kept.append(torch.empty(parameter.shape, dtype=torch.uint8, device="meta"))
            parameter.grad = None
            ledger.count(kept[-1], "gradients")
        else:
            ledger.count(parameter.grad, "gradients")

    kept: list[torch.Tensor] = []
    hooks = [head.register_forward_pre_hook(enter_head)]
    hooks += [
        p.register_post_accumulate_grad_hook(keep_gradient) for p in model.parameters() if p.requires_grad
    ]
    try:
        with ledger:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError) as e:
        raise PlanError(
            f"{type(model).__name__}: cannot run on the meta device: {str(e).splitlines()[0][:200]}"
        ) from e
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
        Ledger.current = None
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
        rows, groups = parameter.shape[0], self.cards
        if parameter.plan_of_experts:
            rows, groups = -(-rows // self.experts), self.cards // self.experts
        return -(-rows // groups) * (parameter.numel() / parameter.shape[0])

    def received(self, parameter: Any) -> float:
        """Elements that a card receives for the whole parameter, or for the experts of its group."""
        whole = parameter.numel() / (self.experts if parameter.plan_of_experts else 1)
        return max(whole - self.own(parameter), 0)


@dataclass
class Plan:
    """What a training step takes on each card, in bytes unless said otherwise.

    Attributes:
        batch, length: Tokens on each card.
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
            self._steps[batch, length] = trace(self.model, batch, length, self.setup, self.recipe)
        return self._steps[batch, length]

    def plan(self, batch: int, length: int, card: Card | None = None, cluster: Cluster | None = None) -> Plan:
        """The plan of steps of ``[batch, length]`` tokens on each of the cards."""
        cluster = cluster or Cluster()
        step, several = self.step(batch, length), cluster.cards > 1
        parts: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        gradients = update = 0.0
        for p in self.model.parameters():
            own, size = cluster.own(p), FORMATS[p.plan_format]
            counts[p.plan_part] += p.numel()
            parts[
                "adapters" if p.plan_part == "adapters" else f"weights: {p.plan_part} ({p.plan_format})"
            ] += own * size
            if p.requires_grad:
                gradients += own * self._gradient_size(p)
                parts["optimizer"] += self._optimizer_bytes(p, own)
                update = max(update, self._update_bytes(p, own))
        computing = (
            {**step.rest, "gradients": gradients, "gathered layers": self._gathered(cluster)}
            if several
            else step.peak
        )
        updating = {"gradients": gradients, "workspace": update}
        parts.update(max(computing, updating, key=lambda phase: sum(phase.values())))
        if self.setup.device == "cuda":
            parts["allocator's slack"] = step.slack
            parts["CUDA context and libraries"] = CONTEXT + COMMUNICATION * several
        traffic = self._traffic(batch * length, cluster) if several else {}
        return Plan(
            type(self.model).__name__, self.name, self.setup, batch, length, cluster,
            parts={name: size for name, size in parts.items() if size},
            peak=parts.total(),
            capacity=None if card is None else card.memory * GIB,
            parameters=dict(counts),
            trained=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            operations=sum(operations for operations, _ in step.work),
            traffic=traffic,
            seconds=self._seconds(step, traffic, gradients + parts["optimizer"], card, cluster),
            history=step.history,
        )  # fmt: skip

    def _seconds(
        self, step: Step, traffic: dict[str, float], state: float, card: Card | None, cluster: Cluster
    ) -> dict[str, float]:
        if card is None or not card.tflops:
            return {}
        rate, bandwidth = card.tflops * 1e12, card.bandwidth * 1e9
        link = (card.link if cluster.cards <= NODE else min(card.link, NETWORK)) * 1e9
        return {
            "compute": sum(max(operations / rate, moved / bandwidth) for operations, moved in step.work),
            "optimizer": 3 * state / bandwidth,
            **{name: size / link for name, size in traffic.items()},
        }

    def _gradient_size(self, parameter: Any) -> float:
        return self.recipe.gradient if parameter.plan_format == "fp8" else FORMATS[parameter.plan_format]

    def _optimizer_bytes(self, parameter: Any, elements: float) -> float:
        if self.recipe.optimizer == "adamw":
            return 2 * elements * FORMATS[parameter.plan_format]
        if self.recipe.optimizer == "adamw8bit":
            return 2 * elements * (1 + 4 / 256)
        return 4 * elements * (1 if parameter.dim() < 2 else sum(1 / n for n in parameter.shape[-2:]))

    def _update_bytes(self, parameter: Any, elements: float) -> float:
        """What the optimizer's step makes: nothing in fused AdamW, a matrix and its update in float32 in Adafactor."""
        if self.recipe.optimizer != "adafactor":
            return 0
        return 8 * elements / (parameter.shape[0] if parameter.dim() > 2 else 1)

    def _units(self) -> list[tuple[bool, list[Any]]]:
        """What FSDP2 gathers together: whether it is a layer, and its parameters; the last is all that no layer has."""
        units: dict[str, list[Any]] = {}
        for name, parameter in self.model.named_parameters():
            stack, found, rest = name.partition(".layers.")
            units.setdefault(f"{stack}.{rest.split('.')[0]}" if found else "", []).append(parameter)
        return [(bool(name), parameters) for name, parameters in units.items()]

    def _gathered(self, cluster: Cluster) -> float:
        """Two layers (FSDP2 gathers one ahead), one's gradients before they are split, and what no layer has."""
        layers, others = [0.0], 0.0
        for is_layer, parameters in self._units():
            size = sum(cluster.received(p) * FORMATS[p.plan_format] for p in parameters)
            gradients = sum(
                cluster.received(p) * self._gradient_size(p) for p in parameters if p.requires_grad
            )
            if is_layer:
                layers.append(2 * size + gradients)
            else:
                others += size + gradients
        return max(layers) + others

    def _traffic(self, tokens: int, cluster: Cluster) -> dict[str, float]:
        traffic: Counter[str] = Counter()
        for is_layer, parameters in self._units():
            for p in parameters:
                # A layer is gathered again for the backward.
                traffic["all-gather"] += (1 + is_layer) * cluster.received(p) * FORMATS[p.plan_format]
                if p.requires_grad:
                    traffic["reduce-scatter"] += cluster.received(p) * self._gradient_size(p)
        if cluster.experts > 1:
            layers = sum(is_experts(module) for module in self.model.modules())
            chosen = (
                getattr(self.text, "num_experts_per_tok", None)
                or getattr(self.text, "top_k_experts", None)
                or 1
            )
            rows = tokens * chosen * (1 - 1 / cluster.experts)
            # There and back, in the forward, in its repetition and in the backward.
            times = 2 * (2 + self.setup.checkpointing)
            traffic["all-to-all"] = layers * times * rows * self.text.hidden_size * FORMATS[self.setup.dtype]
        return dict(traffic)


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
    return Card(float(match[1]) * (1e9 / GIB if match[2] == "GB" else 1), 0, 0, 0)


def show(plan: Plan, card: str) -> str:
    """The plan as a table."""
    cluster = plan.cluster
    lines = [
        f"{plan.model}, {plan.recipe}: {plan.batch} x {plan.length:,} tokens on each of {cluster.cards} {card}"
        if cluster.cards > 1
        else f"{plan.model}, {plan.recipe}: {plan.batch} x {plan.length:,} tokens on {card}"
    ]
    counts = ", ".join(f"{part} {n / 1e9:.2f}" for part, n in plan.parameters.items())
    total = sum(n for part, n in plan.parameters.items() if part != "adapters")
    lines += [
        f"{total / 1e9:.2f} billion parameters ({counts}), of which {plan.trained / 1e9:.3f} are trained",
        "",
    ]
    width = max(map(len, plan.parts))
    for part, size in plan.parts.items():
        lines.append(f"  {part:{width}} {size / GIB:9.3f} GiB  {'#' * round(40 * size / plan.peak)}")
    lines.append(f"  {'at the peak':{width}} {plan.peak / GIB:9.3f} GiB")
    if plan.capacity is not None:
        spare = (plan.capacity - plan.peak) / GIB
        verdict = "fits, and leaves" if plan.fits else "does not fit, by"
        lines.append(
            f"  {'on the card':{width}} {plan.capacity / GIB:9.3f} GiB  {verdict} {abs(spare):.1f} GiB"
        )
    lines += ["", f"A step is {plan.operations / 1e12:,.1f} TFLOP on each card."]
    if plan.traffic:
        lines.append(
            "A card receives "
            + ", ".join(f"{n / GIB:.2f} GiB by {kind}" for kind, n in plan.traffic.items())
            + "."
        )
    if plan.seconds:
        tokens = plan.batch * plan.length * cluster.cards / plan.step_seconds
        by = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in plan.seconds.items())
        lines.append(
            f"By the roof it takes {plan.step_seconds:.3f} s at least, {tokens:,.0f} tokens a second: {by}."
        )
    return "\n".join(lines)


def draw(plan: Plan, card: str, path: str) -> None:
    """A picture of the parts, and of the step's memory over time, as a PNG."""
    try:
        import matplotlib
    except ImportError:
        raise PlanError("--png: needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 6), height_ratios=[2, 3], layout="constrained")
    left = 0.0
    for part, size in plan.parts.items():
        top.barh([0], [size / GIB], left=left, label=part)
        left += size / GIB
    if plan.capacity is not None:
        top.axvline(plan.capacity / GIB, color="black", linestyle="--", label=card)
    top.set(
        yticks=[], xlabel="GiB", title=f"{plan.model}, {plan.recipe}, {plan.batch} x {plan.length:,} tokens"
    )
    top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=3, fontsize=7)
    stride = max(1, len(plan.history) // 4000)
    rows = plan.history[::stride]
    bottom.stackplot(
        range(len(rows)), *([row[i] / GIB for row in rows] for i in range(len(PHASES))), labels=PHASES
    )
    bottom.set(xticks=[], xlabel="one step: forward, then backward", ylabel="GiB made by the step")
    bottom.legend(fontsize=7)
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


@contextlib.contextmanager
def replaced(path: str) -> Iterator[str]:
    """A path to write to, which takes the place of ``path`` when all is written."""
    temporary = f"{path}.part"
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        raise PlanError(f"{path}: cannot be written: {e.strerror}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def advice(planner: Planner, config: Any, plan: Plan, card: Card) -> str:
    """What would fit where a plan does not."""
    cluster, options = plan.cluster, []
    shorter = largest(
        lambda n: planner.plan(1, n, card, cluster), plan.length // 2, 128, plan.batch * plan.length
    )
    if shorter:
        options.append(f"--batch 1 --length {shorter}")
    names = list(RECIPES)
    for name in reversed(names[: names.index(plan.recipe)]):
        if Planner(config, name, plan.setup).plan(plan.batch, plan.length, card, cluster).fits:
            options.append(f"--recipe {name}")
            break
    cards = cluster.cards * 2
    while (
        cards <= 1024
        and not planner.plan(plan.batch, plan.length, card, Cluster(cards, cluster.experts)).fits
    ):
        cards *= 2
    if cards <= 1024:
        options.append(f"--cards {cards}")
    found = (
        "; what would fit: " + ", or ".join(options)
        if options
        else "; no length, recipe or number of cards would"
    )
    return f"does not fit: {plan.peak / GIB:.1f} GiB of {card.memory:.1f} GiB{found}"


def main() -> None:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="config.json, or a directory that has one")
    parser.add_argument("--card", required=True, help=f"memory such as 24GB, or one of {', '.join(CARDS)}")
    parser.add_argument("--recipe", default="qlora", help=", ".join(RECIPES))
    parser.add_argument("--batch", type=int, default=1, help="rows on each card")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--cards", type=int, default=1, help="1 to 1024, by FSDP2")
    parser.add_argument(
        "--expert-parallel", type=int, default=1, help="cards among which experts are divided"
    )
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument(
        "--attention", choices=["scattermoe_flash", "sdpa", "eager"], default="scattermoe_flash"
    )
    parser.add_argument("--experts", choices=["scattermoe", "grouped_mm", "eager"], default="scattermoe")
    parser.add_argument(
        "--logits", action="store_true", help="the model's own loss, with all logits in memory"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--cpu", action="store_true", help="the card is a computer's memory")
    parser.add_argument("--tflops", type=float, help="the card's dense rate in 16 bits")
    parser.add_argument("--bandwidth", type=float, help="of its memory, GB/s")
    parser.add_argument("--link", type=float, help="to other cards, GB/s in one direction")
    parser.add_argument("--json", help="write the plan to this file")
    parser.add_argument("--png", help="draw the plan into this file")
    args = parser.parse_args()
    try:
        run(args)
    except PlanError as e:
        sys.exit(f"plan: {e}")


def run(args: argparse.Namespace) -> None:
    """Plan, print, write and draw what the arguments say."""
    card = parse_card(args.card)
    given = {name: getattr(args, name) for name in ("tflops", "bandwidth", "link") if getattr(args, name)}
    card = replace(card, **given)
    for name in ("batch", "length", "cards", "expert_parallel", "rank"):
        if getattr(args, name) < 1:
            raise PlanError(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(args, name)}")
    if args.cards > 1024 or args.cards % args.expert_parallel:
        raise PlanError(f"--cards: expected at most 1024, a multiple of --expert-parallel, got {args.cards}")
    cluster = Cluster(args.cards, args.expert_parallel)
    setup = Setup(
        args.attention, args.experts, not args.logits, not args.no_checkpointing, args.rank,
        device="cpu" if args.cpu else "cuda",
    )  # fmt: skip
    config = load_config(args.model)
    planner = Planner(config, args.recipe, setup)
    plan = planner.plan(args.batch, args.length, card, cluster)
    print(show(plan, args.card))
    if plan.fits:
        limit = getattr(planner.text, "max_position_embeddings", None) or 1 << 20
        length = largest(lambda n: planner.plan(args.batch, n, card, cluster), args.length, 128, limit)
        batch = largest(lambda n: planner.plan(n, args.length, card, cluster), args.batch, 1, 4096)
        print(
            f"The longest rows at this batch: {length:,} tokens. The largest batch at this length: {batch:,}."
        )
        for change, other in OTHERWISE.items():
            peak = (
                Planner(config, args.recipe, replace(setup, **other))
                .plan(args.batch, args.length, card, cluster)
                .peak
            )
            print(f"{change}: {peak / GIB:.3f} GiB at the peak.")
    if args.json:
        with replaced(args.json) as temporary:
            values = {"fits": plan.fits, "step_seconds": plan.step_seconds, **asdict(plan)}
            del values["history"]
            Path(temporary).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    if args.png:
        draw(plan, args.card, args.png)
    if not plan.fits:
        raise PlanError(advice(planner, config, plan, card))


OTHERWISE = {
    "Without checkpointing": {"checkpointing": False},
    "With all logits in memory": {"fused_loss": False},
}

if __name__ == "__main__":
    main()
