"""One MoE layer with low-rank factors, forward and backward: its weights quantized against the same in bfloat16.

All in one process, a step of each in turn, so that what else the machine does slows down all alike. Prints medians,
their ratio to bfloat16's, the bytes of the weights, and the peak above them. Codes are random: no time depends on them.
``scattermoe`` is the layer over the case's format. ``decoded by torch`` is the same without bitsandbytes, whose decoder
it takes on a CPU where it is installed. ``scattermoe + PEFT`` is a layer of transformers with PEFT's LoRA over NF4,
computed by ours; ``PEFT's own`` the same layer on PEFT's path, which decodes all of it each time it is read, and
``bitsandbytes + PEFT`` that path over bitsandbytes' own parametrization of the same weights, mended: as of PEFT 0.21.2
it neither applies nor trains the first projection's factors there.

    python benchmarks/compare_quantized.py [--device cuda] [--cases small-nf4,medium-float8,...] [--output FILE]
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from compare import DEFAULT_SHAPES, SHAPES
from interleaved import FirstResults, measure_in_turns, process_peak
from layer import RANK, Layer, Shape
from measuring import Alone, compare_cases, comparison_parser, parse_cases, run_beside_others

FORMATS = ("nf4", "float8", "mxfp4")
OURS, WITH_PEFT, PEFT = "scattermoe", "scattermoe + PEFT", "PEFT's own"
BITSANDBYTES = "bitsandbytes + PEFT"


@dataclass(frozen=True)
class Case(Shape):
    """A layer's sizes, and one of ``FORMATS``. The dtype is not read."""

    format: str


CASES = {
    device: {
        f"{name}-{format}": Case(**asdict(SHAPES[name]), format=format)
        for name in names.split(",")
        for format in FORMATS
    }
    for device, names in DEFAULT_SHAPES.items()
}


class Layers:
    """A layer's factors and rows, and its weights in bfloat16 and in the case's format.

    ``kernel`` is the built package's name.
    """

    def __init__(self, kernel: str, shape: Case) -> None:
        self._kernel = kernel
        hidden, width, experts = shape.hidden, shape.intermediate, shape.experts
        self._sizes = {"gate_up": (experts, 2 * width, hidden), "down": (experts, hidden, width)}
        self.weights = {
            name: [self._weight(name, *size) for size in self._sizes.values()]
            for name in ("bfloat16", shape.format)
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
    """A way of computing a layer: a step of it, the bytes of its weights, and what to compare the results with."""

    step: Callable[[], Any]
    weight_bytes: int
    first: FirstResults | None = None

    def __call__(self) -> Any:
        return self.step()


def by_torch(step: Callable[[], Any], cpu: Any) -> None:
    """A step in which ``cpu``, our decoder's module, does not find bitsandbytes."""
    with mock.patch.object(cpu, "has_bitsandbytes", return_value=False):
        step()


def peft_layer(kernel: Any, shape: Shape, implementation: str, device: str, first: FirstResults) -> Way:
    """A layer of transformers with PEFT's LoRA, its experts in NF4."""
    # The same weights for each.
    torch.manual_seed(0)
    with torch.device(device):
        layer = Layer(shape, implementation)
        kernel.quantize_experts(layer.module, "nf4")
    experts = (p for p in layer.module.parameters() if not p.requires_grad)
    return Way(lambda: [*layer.results().values()], sum(p.stack.nbytes for p in experts), first)


def bitsandbytes_layer(shape: Shape, device: str, first: FirstResults) -> Way:
    """The layer of :func:`peft_layer` with its weights as ``bitsandbytes.nn.parametrize`` keeps them.

    PEFT's outer wrapper caches parametrized weights while the inner one still adds its factors, and so the weight
    without them; and it does not find these when it removes them afterwards, so that they add up step by step.
    """
    parametrize = importlib.import_module("bitsandbytes.nn.parametrize")
    torch.manual_seed(0)
    with torch.device(device):
        layer = Layer(shape, "grouped_mm")
    (experts,) = (module for module in layer.module.modules() if hasattr(module, "has_gate"))
    for name in ("gate_up_proj", "down_proj"):
        parametrize.replace_parameter_4bit(experts, name, quant_type="nf4")

    def step() -> list[torch.Tensor]:
        # bitsandbytes' own cache begins when all factors are there.
        with mock.patch.object(torch.nn.utils.parametrize, "cached", nullcontext), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Could not find any LoRA parametrization")
            results = layer.results()
        for parametrizations in experts.parametrizations.values():
            del parametrizations[1:]
        return [*results.values()]

    kept = [(each.original, each[0].quant_state.absmax) for each in experts.parametrizations.values()]
    return Way(step, sum(codes.nbytes + scales.nbytes for codes, scales in kept), first)


def ways(kernel: Any, case: Case, device: str) -> dict[str, Callable[[], Way]]:
    """Makers of all that is compared, by name; the first is the one that the others' ratios are to."""
    torch.manual_seed(0)
    with torch.device(device):
        layers = Layers(kernel.__name__, case)
    dense, quantized = (Way(partial(layers.step, name), layers.nbytes(name)) for name in layers.weights)
    makers = {"bfloat16": lambda: dense, OURS: lambda: quantized}
    if case.format == "nf4":
        cpu = importlib.import_module(f"{kernel.__name__}.ops.quantization.cpu")
        if device == "cpu" and cpu.has_bitsandbytes():
            by_torch_alone = Way(partial(by_torch, quantized.step, cpu), quantized.weight_bytes)
            makers["decoded by torch"] = lambda: by_torch_alone
        sizes = {name: value for name, value in asdict(case).items() if name != "format"}
        shape, first = Shape(**{**sizes, "dtype": "bfloat16"}), FirstResults()
        for name, implementation in ((PEFT, "grouped_mm"), (WITH_PEFT, "scattermoe")):
            makers[name] = partial(peft_layer, kernel, shape, implementation, device, first)
        makers[BITSANDBYTES] = partial(bitsandbytes_layer, shape, device, first)
    return makers


def measure(
    kernel: Any, case: Case, device: str, seconds: float, alone: Alone = run_beside_others
) -> dict[str, Any]:
    """The case's rows, as of :func:`measure_in_turns`, with the bytes of the weights and the peak above them."""
    kernel.register()
    with suppress(ImportError):
        importlib.import_module("bitsandbytes")

    def describe(way: Way) -> dict[str, Any]:
        results = way()
        differs = {"difference": way.first.difference(results)} if way.first else {}
        del results
        peak = process_peak(way, device)
        return {"weight_bytes": way.weight_bytes, "peak_bytes_above_weights": peak, **differs}

    return measure_in_turns(ways(kernel, case, device), describe, device, seconds, alone)


def show(name: str, case: Case, rows: dict[str, Any]) -> None:
    """Prints a line for each way, with its ratios to bfloat16's."""
    print(f"\n{name}: {case}, in bfloat16, r={RANK}")
    dense = rows["bfloat16"]
    for implementation, row in rows.items():
        if "not" in row or "not" in dense:
            print(f"{implementation:<20}  {row.get('not', '')}", flush=True)
            continue
        times, weights, peak = (
            row[key] / dense[key] for key in ("ms", "weight_bytes", "peak_bytes_above_weights")
        )
        print(
            f"{implementation:<20}{row['ms']:>9.1f} ms{times:>7.2f}x{row['weight_bytes'] / 1e6:>9.0f} MB"
            f"{weights:>7.3f}x{row['peak_bytes_above_weights'] / 1e6:>9.0f} MB above{peak:>6.2f}x",
            flush=True,
        )
    mine = rows.get(WITH_PEFT, {})
    for name in (PEFT, BITSANDBYTES):
        other = rows.get(name, {})
        if "ms" in other and "ms" in mine:
            print(f"{'':<20}{WITH_PEFT} is {other['ms'] / mine['ms']:.1f}x as fast as {name}", flush=True)


def main() -> None:
    arguments, cases = parse_cases(comparison_parser(__doc__, list(CASES)), CASES, 5.0)

    def measured(kernel: Any, name: str, case: Case) -> dict[str, Any]:
        rows = measure(kernel, case, arguments.device, arguments.seconds)
        show(name, case, rows)
        return rows

    compare_cases(arguments, cases, measured)


if __name__ == "__main__":
    main()
