"""One MoE layer with low-rank factors, forward and backward: its weights quantized against the same in bfloat16.

All in one process, a step of each in turn, so that what else the machine does slows down all alike. Prints medians,
their ratio to bfloat16's, the bytes of the weights, and the peak above them. Codes are random: no time depends on them.
``nf4 by torch`` is decoded without bitsandbytes, whose decoder ``nf4`` takes where it is installed. ``nf4 + PEFT`` is a
layer of transformers with PEFT's LoRA over NF4, computed by ours; ``PEFT's own`` the same layer on PEFT's path, which
decodes all of it each time it is read.

    python benchmarks/compare_quantized.py [--device cuda] [--shapes small,medium,large] [--formats nf4,float8,mxfp4]
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

from compare import DEFAULT_SHAPES, SHAPES
from layer import RANK, Layer, Shape
from measuring import (
    built_kernel,
    chosen,
    comparison_parser,
    device_name,
    peak_memory,
    require,
    start_memory,
    write,
)

if TYPE_CHECKING:
    import torch

FORMATS = ("nf4", "float8", "mxfp4")
PEFT = "PEFT's own"


class Layers:
    """A layer's factors and rows, and its weights in bfloat16 and in each of the formats.

    Args:
        kernel: The built package's name.
        shape: Sizes; its dtype is not read.
        formats: Some of ``FORMATS``.
    """

    def __init__(self, kernel: str, shape: Shape, formats: Sequence[str]) -> None:
        import torch

        self._kernel, self._shape = kernel, shape
        hidden, width, experts = shape.hidden, shape.intermediate, shape.experts
        self._sizes = {"gate_up": (experts, 2 * width, hidden), "down": (experts, hidden, width)}
        self.weights = {
            name: [self._weight(name, *size) for size in self._sizes.values()]
            for name in ("bfloat16", *formats)
        }
        factors = [
            torch.randn(experts, *size, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
            for n, k in ((2 * width, hidden), (hidden, width))
            for size in ((RANK, k), (n, RANK))
        ]
        self._x = torch.randn(shape.tokens, hidden, dtype=torch.bfloat16).requires_grad_()
        self._routing_weights = torch.rand(shape.tokens, shape.top_k)
        index = torch.rand(shape.tokens, experts).topk(shape.top_k).indices
        self._routing = self._module("ops.routing").sort_by_expert(index, experts)
        self._leaves = [self._x, *factors]
        self._grad = torch.randn_like(self._x)

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"{self._kernel}.{name}")

    def _weight(self, name: str, experts: int, n: int, k: int) -> Any:
        import torch

        if name == "bfloat16":
            return torch.randn(experts, n, k, dtype=torch.bfloat16).mul_(0.02)
        layout = self._module("ops.quantization.formats").Format
        scales: torch.Tensor
        if name == "float8":
            element, scales = layout("e4m3", 128, 128), torch.rand(experts, -(-n // 128), -(-k // 128))
            codes = torch.randn(experts, n, k, dtype=torch.bfloat16).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            codes = torch.randint(256, (experts, n, k // 2), dtype=torch.uint8)
            if name == "nf4":
                element, scales = layout("nf4", 0, 64), torch.rand(-(-experts * n * k // 64))
            else:
                element = layout("e2m1", 1, 32)
                scales = torch.rand(experts, n, -(-k // 32)).to(torch.float8_e8m0fnu)
        stack = self._module("ops.quantization.stack").QuantizedStack
        return stack(codes, (scales,), element, torch.bfloat16).check(name)

    def nbytes(self, name: str) -> int:
        """Bytes of both weights."""
        return sum(weight.nbytes for weight in self.weights[name])

    def step(self, name: str) -> None:
        """Output and all gradients but the weights'."""
        import torch

        up, down = self.weights[name]
        _, *factors = self._leaves
        operands = self._module("ops.experts.arguments").Operands(
            self._x, up, down, self._routing_weights, *factors, None, None, *self._routing
        )
        gate = self._module("ops.activation").Gate("gelu_tanh")
        out, *_ = self._module("ops.experts.op").experts(operands, gate, False, True)
        torch.autograd.grad(out, self._leaves, self._grad)


@dataclass(frozen=True)
class Way:
    """A way of computing a layer: a step of it, and the bytes of its weights."""

    step: Callable[[], Any]
    weight_bytes: int


def by_torch(step: Callable[[], Any], cpu: Any) -> None:
    """A step in which ``cpu``, our decoder's module, does not find bitsandbytes."""
    with mock.patch.object(cpu, "has_bitsandbytes", return_value=False):
        step()


def peft_layer(kernel: Any, shape: Shape, implementation: str) -> Way:
    """A layer of transformers with PEFT's LoRA, its experts in NF4."""
    layer = Layer(replace(shape, dtype="bfloat16"), implementation)
    kernel.quantize_experts(layer.module, "nf4")
    experts = (p for p in layer.module.parameters() if not p.requires_grad)
    return Way(layer.results, sum(p.stack.nbytes for p in experts))


def ways(kernel: Any, shape: Shape, formats: Sequence[str]) -> dict[str, Way]:
    """All that is compared, by name; the first is what the others' ratios are to."""
    layers = Layers(kernel.__name__, shape, formats)
    cpu = importlib.import_module(f"{kernel.__name__}.ops.quantization.cpu")
    rows = {name: Way(partial(layers.step, name), layers.nbytes(name)) for name in layers.weights}
    if "nf4" in formats:
        if cpu.has_bitsandbytes():
            rows["nf4 by torch"] = Way(partial(by_torch, rows["nf4"].step, cpu), rows["nf4"].weight_bytes)
        rows["nf4 + PEFT"] = peft_layer(kernel, shape, "scattermoe")
        rows[PEFT] = peft_layer(kernel, shape, "grouped_mm")
    return rows


def measure(compared: Mapping[str, Way], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, bytes of the weights and the peak above them, of each."""
    import torch

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    rows: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for name, way in compared.items():
        way.step()
        finish()
        before = start_memory(device)
        way.step()
        finish()
        rows[name] = {
            "weight_bytes": way.weight_bytes,
            "peak_bytes_above_weights": peak_memory(device) - before,
        }
    for _ in range(repeats):
        for name, way in compared.items():
            begin = time.perf_counter()
            way.step()
            finish()
            seconds[name].append(time.perf_counter() - begin)
    for name, times in seconds.items():
        rows[name] |= {"ms": 1000 * statistics.median(times), "repeats": repeats}
    return rows


def print_rows(rows: Mapping[str, Mapping[str, float]]) -> None:
    """A line for each way, with its ratios to bfloat16's."""
    dense = rows["bfloat16"]
    for name, row in rows.items():
        times, weights, peak = (
            row[key] / dense[key] for key in ("ms", "weight_bytes", "peak_bytes_above_weights")
        )
        print(
            f"{name:<20}{row['ms']:>9.1f} ms{times:>7.2f}x{row['weight_bytes'] / 1e6:>9.0f} MB{weights:>7.3f}x"
            f"{row['peak_bytes_above_weights'] / 1e6:>9.0f} MB above{peak:>6.2f}x",
            flush=True,
        )
    if PEFT in rows:
        ratio = rows[PEFT]["ms"] / rows["nf4 + PEFT"]["ms"]
        print(f"{'':<20}nf4 + PEFT is {ratio:.1f}x as fast as PEFT's own", flush=True)


def main() -> None:
    parser = comparison_parser(__doc__, list(DEFAULT_SHAPES))
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; default {DEFAULT_SHAPES}")
    parser.add_argument("--formats", help=f"of {', '.join(FORMATS)}; default all")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each, of which the median is taken")
    arguments = parser.parse_args()
    shapes = chosen(parser, "--shapes", arguments.shapes or DEFAULT_SHAPES[arguments.device], SHAPES)
    formats = list(chosen(parser, "--formats", arguments.formats, dict.fromkeys(FORMATS)))
    require(arguments.device)
    import torch

    with suppress(ImportError):
        importlib.import_module("bitsandbytes")
    results: dict[str, Any] = {}
    with built_kernel() as kernel:
        kernel.register()
        print(device_name(arguments.device))
        for name, shape in shapes.items():
            torch.manual_seed(0)
            print(f"\n{name}: {shape}, in bfloat16, r={RANK}", flush=True)
            with torch.device(arguments.device):
                compared = ways(kernel, shape, formats)
            results[name] = measure(compared, arguments.device, arguments.repeats)
            print_rows(results[name])
            write(arguments.output, {"results": results})


if __name__ == "__main__":
    main()
