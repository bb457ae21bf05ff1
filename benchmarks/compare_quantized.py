"""One MoE layer with low-rank factors, forward and backward: its weights quantized against the same in bfloat16.

All in one process, a step of each in turn, so that what else the machine does slows down all alike. Prints medians,
their ratio to bfloat16's, the bytes of the weights, and the peak above them. Codes are random: no time depends on them.
Where bitsandbytes is installed its decoder decodes NF4 and FP4 on a CPU; ``--without-bitsandbytes`` leaves it out.

    python benchmarks/compare_quantized.py [--device cuda] [--shapes small,medium,large] [--formats nf4,float8,mxfp4]
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare import DEFAULT_SHAPES, SHAPES
from layer import RANK, Shape
from measuring import REPOSITORY, device_name, peak_memory, require, start_memory, write

if TYPE_CHECKING:
    import torch

FORMATS = ("nf4", "float8", "mxfp4")


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


def measure(layers: Layers, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, bytes of the weights and the peak above them, of each kind of weight."""
    import torch

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    rows: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in layers.weights}
    for name in layers.weights:
        layers.step(name)
        finish()
        before = start_memory(device)
        layers.step(name)
        finish()
        rows[name] = {
            "weight_bytes": layers.nbytes(name),
            "peak_bytes_above_weights": peak_memory(device) - before,
        }
    for _ in range(repeats):
        for name, times in seconds.items():
            begin = time.perf_counter()
            layers.step(name)
            finish()
            times.append(time.perf_counter() - begin)
    for name, times in seconds.items():
        rows[name] |= {"ms": 1000 * statistics.median(times), "repeats": repeats}
    return rows


def print_rows(rows: Mapping[str, Mapping[str, float]]) -> None:
    """A line for each kind of weight, with its ratios to bfloat16's."""
    dense = rows["bfloat16"]
    for name, row in rows.items():
        times, weights, peak = (
            row[key] / dense[key] for key in ("ms", "weight_bytes", "peak_bytes_above_weights")
        )
        print(
            f"{name:<10}{row['ms']:>9.1f} ms{times:>7.2f}x{row['weight_bytes'] / 1e6:>9.0f} MB{weights:>7.3f}x"
            f"{row['peak_bytes_above_weights'] / 1e6:>9.0f} MB above{peak:>6.2f}x",
            flush=True,
        )


def load(build: Callable[[Path], Path], scratch: str) -> str:
    """The name of the built package, imported as users import it."""
    from kernels import get_kernel

    os.environ["LOCAL_KERNELS"] = f"org/scattermoe-lora={build(Path(scratch, 'build'))}"
    name: str = get_kernel("org/scattermoe-lora", version=1).__name__
    return name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEFAULT_SHAPES, default="cpu")
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; default {DEFAULT_SHAPES}")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each, of which the median is taken")
    parser.add_argument("--without-bitsandbytes", action="store_true", help="decode with torch alone")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    shapes = (arguments.shapes or DEFAULT_SHAPES[arguments.device]).split(",")
    formats = arguments.formats.split(",")
    for option, names, choices in (("shapes", shapes, tuple(SHAPES)), ("formats", formats, FORMATS)):
        if unknown := set(names) - set(choices):
            parser.error(f"--{option}: {', '.join(sorted(unknown))}: none of {', '.join(choices)}")
    require(arguments.device)
    import torch
    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec

    if not arguments.without_bitsandbytes:
        with suppress(ImportError):
            importlib.import_module("bitsandbytes")
    with tempfile.TemporaryDirectory() as scratch:
        kernel = load(lambda folder: build(load_spec(REPOSITORY), folder).directory, scratch)
        has_bitsandbytes = importlib.import_module(f"{kernel}.ops.quantization.cpu").has_bitsandbytes()
        print(f"{device_name(arguments.device)}, {'with' if has_bitsandbytes else 'without'} bitsandbytes")
        results: dict[str, Any] = {}
        for name in shapes:
            torch.manual_seed(0)
            print(f"\n{name}: {SHAPES[name]}, in bfloat16, r={RANK}", flush=True)
            with torch.device(arguments.device):
                layers = Layers(kernel, SHAPES[name], formats)
            results[name] = measure(layers, arguments.device, arguments.repeats)
            print_rows(results[name])
            write(arguments.output, {"bitsandbytes": has_bitsandbytes, "results": results})


if __name__ == "__main__":
    main()
