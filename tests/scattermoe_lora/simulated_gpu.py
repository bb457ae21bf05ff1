"""Launches the operators' Triton kernels as on a GPU, but for the launch itself; run by test_launches.py.

Triton compiles for the arguments that it gets: an integer that is 1 becomes a constant, None too, and of what 16
divides it knows that. The specifications of ``make compile`` have the values that models have; here are those of the
smallest inputs, where code that takes a constant for a tensor no longer compiles.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import simulated_launches
import torch
from kernels import get_kernel
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class MadeUp:
    """The part of a driver that Triton uses before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


launched: set[tuple[str, str]] = set()
run = JITFunction.run


def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
    # What CUDA takes for a grid.
    assert all(
        isinstance(size, int) and 0 < size < limit
        for size, limit in zip(grid, (2**31, 2**16, 2**16), strict=False)
    )
    launched.add((self.fn.__name__, compiled.hash))
    return compiled


driver.set_active(MadeUp())
JITFunction.run = compile_alone
kernel = get_kernel("org/scattermoe-lora", version=1)
dispatch = importlib.import_module(f"{kernel.__name__}.ops.dispatch")
dispatch.use_triton = lambda x: True


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


def experts(tokens: int, count: int, size: int, rank: int, weights: bool) -> None:
    op = importlib.import_module(f"{kernel.__name__}.ops.experts.op")
    routing = importlib.import_module(f"{kernel.__name__}.ops.routing")
    up, down = leaf(count, 2 * size, size), leaf(count, size, size).detach()
    base = (up, down.requires_grad_(weights), torch.rand(tokens, 1).requires_grad_())
    pairs = (
        leaf(count, rank, size),
        leaf(count, 2 * size, rank),
        leaf(count, rank, size),
        leaf(count, size, rank),
    )
    biases = (leaf(count, 2 * size), leaf(count, size))
    sorting = routing.sort_by_expert(torch.zeros(tokens, 1, dtype=torch.int64), count)
    out, *_ = op.experts_forward(
        leaf(tokens, size),
        *base,
        *pairs,
        *biases,
        *sorting,
        "silu",
        False,
        1.0,
        float("inf"),
        0.0,
        False,
        True,
    )
    out.sum().backward()


def gated(gate_up: Any, index: torch.Tensor) -> None:
    names = ("ops.experts.op", "ops.experts.arguments", "ops.activation", "ops.routing")
    op, arguments, activation, routing = (
        importlib.import_module(f"{kernel.__name__}.{name}") for name in names
    )
    weights = (gate_up, leaf(1, 1, 1).detach(), torch.rand(1, 1))
    layer = arguments.Operands(leaf(1, 1), *weights, *(6 * [None]), *routing.sort_by_expert(index, 1))
    op.experts(layer, activation.Gate("silu", True, 1.5, 2.0, 1.0), False, False)


def quantized(element: str, rows: int, columns: int, nested: int, *scales: torch.Tensor) -> None:
    formats, stack, decoding = (
        importlib.import_module(f"{kernel.__name__}.ops.quantization.{name}")
        for name in ("formats", "stack", "decode")
    )
    layout = formats.Format(element, rows, columns, nested)
    codes = torch.zeros(1, 1, 1, dtype=torch.uint8)
    weight = stack.QuantizedStack(codes, scales, layout, torch.bfloat16).check("weight")
    decoding.decode(weight, [0])
    size = codes.shape[2] * layout.codes_per_byte
    index = torch.zeros(1, 1, dtype=torch.int64)
    if size == 2:
        gated(weight.mT, index)
    kernel.grouped_linear(leaf(1, size), weight, index, leaf(1, 1, size), leaf(1, 1, 1)).sum().backward()


experts(tokens=1, count=1, size=1, rank=1, weights=True)
experts(tokens=1, count=3, size=16, rank=1, weights=False)
gpu = importlib.import_module(f"{kernel.__name__}.ops.grouped_linear.gpu")
pairs = importlib.import_module(f"{kernel.__name__}.ops.grouped_linear.pairs")
tile, own_launch = gpu.tile, pairs.own_launch
pairs.own_launch = lambda *_: {"BLOCK": 32}
for count in (1, 3):
    pairs.sort_pairs(torch.zeros(count, 1, dtype=torch.int64), count)
# The layers' own order has to be written.
pairs.own_launch = lambda name, *_: {"BLOCK": 32} if name == "sum_choices" else None


def launched_with(option: str) -> Callable[..., dict[str, int]]:
    return lambda name, *sizes: {**tile(name, *sizes), **({option: 1} if name == "grouped_matmul" else {})}


for option in gpu.OPTIONS:
    gpu.tile = launched_with(option)
    experts(tokens=1, count=1, size=1, rank=1, weights=False)
    experts(tokens=2, count=3, size=16, rank=16, weights=False)
gpu.tile, pairs.own_launch = tile, own_launch
for heads, length, packed in ((1, 1, False), (1, 1, True), (2, 1, False)):
    q, k = leaf(length, heads, 16), leaf(length, 1, 16)
    if packed:
        starts = torch.tensor([0, length], dtype=torch.int32)
        out = kernel.flash_attn_varlen_func(q, k, k, starts, starts, length, length, causal=True)
    else:
        out = kernel.flash_attn_func(q[None], k[None], k[None].clone(), window_size=(1, 1), softcap=1.0)
    out.sum().backward()
for weight in (None, leaf(2)):
    kernel.rms_norm_rotary(leaf(1, 1, 1, 2), weight, *(2 * [torch.ones(1, 1, 2)])).sum().backward()
    kernel.rms_norm_rotary(leaf(1, 1, 1, 2), weight).sum().backward()
transpose = importlib.import_module(f"{kernel.__name__}.ops.grouped_linear.transpose")
for sizes in ((1, 1), (16, 1), (1, 16)):
    transpose.transpose_and_scale(leaf(*sizes), 1, torch.bfloat16).sum().backward()
quantized("nf4", 0, 32, 1, torch.zeros(1, dtype=torch.uint8), torch.ones(256), torch.ones(1), torch.ones(()))
quantized("e4m3", 1, 1, 0, torch.ones(1, 1, 1))
quantized("e2m1", 1, 32, 0, torch.ones(1, 1, 1).to(torch.float8_e8m0fnu), torch.ones(1))
print(*sorted({name for name, _ in launched}))
JITFunction.run = run
different, codes = simulated_launches.compare(
    importlib.import_module(f"{kernel.__name__}.ops.launcher").launch_kernel
)
print(codes, *different)
