"""What stands between the projections of a decoder layer: ours against transformers' code, and Liger's on a GPU.

The gated activation of Gemma 4 (GeGLU) and of others (SwiGLU), its whole MLP with frozen weights, RMSNorm, and RMSNorm
after a residual's sum; forward and backward. All implementations of a case run in turns in one process, on the same
tensors. Prints a table of medians; ``--output`` also writes the figures as JSON, with the date, the device, the
versions and the commit they belong to. Liger's rows need a GPU and ``pip install liger-kernel==0.8.5``.

    python benchmarks/compare_mlp.py [--device cuda] [--cases geglu,...] [--output FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from interleaved import against_first, measure_in_turns
from measuring import Alone, compare_cases, comparison_parser, parse_cases, run_beside_others
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextMLP


@dataclass(frozen=True)
class Case:
    """An operation on ``tokens`` rows: of ``intermediate`` columns for activations, else of ``hidden``."""

    operation: str
    dtype: str
    tokens: int
    hidden: int
    intermediate: int = 0


# Gemma 4 E2B's sizes on a CPU; the dense MLP beside 26B-A4B's experts, and 31B's, on a GPU.
CASES = {
    "cpu": {
        "geglu": Case("geglu", "float32", 1024, 1536, 6144),
        "geglu-bf16": Case("geglu", "bfloat16", 1024, 1536, 6144),
        "geglu-fp16": Case("geglu", "float16", 1024, 1536, 6144),
        "swiglu": Case("swiglu", "float32", 1024, 1536, 6144),
        "mlp": Case("mlp", "float32", 512, 1536, 6144),
        "mlp-bf16": Case("mlp", "bfloat16", 512, 1536, 6144),
        "norm": Case("norm", "float32", 2048, 1536),
        "norm-bf16": Case("norm", "bfloat16", 2048, 1536),
        "add-norm": Case("add-norm", "float32", 2048, 1536),
        "add-norm-bf16": Case("add-norm", "bfloat16", 2048, 1536),
    },
    "cuda": {
        f"{operation}-{name}": Case(operation, "bfloat16", 8192, *sizes)
        for name, sizes in {"26b": (2816, 2112), "31b": (5376, 21504)}.items()
        for operation in ("geglu", "swiglu", "mlp", "norm", "add-norm")
    },
}
# Rounding makes less of a difference than this.
CLOSE = 0.02
EPS = 1e-6


class Setup:
    """A case's inputs, weights and the gradients of its results."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(getattr(torch, case.dtype))

        gated = case.operation in ("geglu", "swiglu")
        shape = case.tokens, case.intermediate if gated else case.hidden
        count = 2 if gated or case.operation == "add-norm" else 1
        self.inputs = [random(*shape).requires_grad_() for _ in range(count)]
        self.grads = [random(*shape) for _ in range(2 if case.operation == "add-norm" else 1)]
        self.activation = "silu" if case.operation == "swiglu" else "gelu_pytorch_tanh"
        if case.operation == "mlp":
            sizes = {"hidden_size": case.hidden, "intermediate_size": case.intermediate}
            layers = {"num_hidden_layers": 1, "num_kv_shared_layers": 0, "use_double_wide_mlp": False}
            config = SimpleNamespace(**sizes, **layers, hidden_activation=self.activation)
            self.mlp = Gemma4TextMLP(config, 0).to(device, getattr(torch, case.dtype)).requires_grad_(False)
        if "norm" in case.operation:
            self.norm = Gemma4RMSNorm(case.hidden, EPS).to(device, getattr(torch, case.dtype))
            self.inputs.append(self.norm.weight)


Step = Callable[..., Any]


def ours(kernel: Any, setup: Setup) -> Step:
    """The kernel's operator."""
    operation, activation = setup.case.operation, "silu" if setup.activation == "silu" else "gelu_tanh"
    if operation == "mlp":
        projections = setup.mlp.gate_proj, setup.mlp.up_proj, setup.mlp.down_proj
        return lambda x: kernel.gated_mlp(x, *projections, activation)
    if operation == "norm":
        return partial(kernel.rms_norm, eps=EPS)
    return (
        partial(kernel.add_rms_norm, eps=EPS)
        if operation == "add-norm"
        else (partial(kernel.gated_activation, activation=activation))
    )


def eager(setup: Setup) -> Step:
    """transformers' code."""
    from transformers.activations import ACT2FN

    operation = setup.case.operation
    if operation == "mlp":
        return setup.mlp
    if operation == "norm":
        return lambda x, weight: setup.norm(x)
    if operation == "add-norm":

        def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[Any, Any]:
            total = x + residual
            return setup.norm(total), total

        return add_norm
    act = ACT2FN[setup.activation]
    return lambda gate, up: act(gate) * up


def liger(setup: Setup) -> Step:
    """liger-kernel's functions, none of which overwrites what the caller has."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    settings = (EPS, 0.0, "gemma", False)
    operation = setup.case.operation
    if operation == "norm":
        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, *settings)
    if operation == "add-norm":
        return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, *settings)
    function = LigerSiLUMulFunction if operation == "swiglu" else LigerGELUMulFunction
    if operation == "mlp":
        mlp = setup.mlp
        return lambda x: mlp.down_proj(function.apply(mlp.gate_proj(x), mlp.up_proj(x)))
    return function.apply


def implementations(kernel: Any, setup: Setup, device: str) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Name and maker of each; a maker may fail where the implementation is not installed."""
    yield "scattermoe", partial(ours, kernel, setup)
    yield "transformers", partial(eager, setup)
    if device == "cuda":
        yield "liger", partial(liger, setup)


def measure(
    kernel: Any, case: Case, device: str, seconds: float, alone: Alone = run_beside_others
) -> dict[str, Any]:
    """The case's rows, as of :func:`measure_in_turns`, with peak memory above the inputs and the largest error."""
    setup = Setup(case, device)

    def prepared(make: Callable[[], Step]) -> Callable[[], list[torch.Tensor]]:
        function = make()

        def step() -> list[torch.Tensor]:
            result = function(*setup.inputs)
            results = list(result) if isinstance(result, tuple) else [result]
            return [*results, *torch.autograd.grad(results, setup.inputs, setup.grads)]

        return step

    makers = {name: partial(prepared, make) for name, make in implementations(kernel, setup, device)}
    return measure_in_turns(makers, against_first(device), device, seconds, alone)


def show(name: str, case: Case, rows: dict[str, Any]) -> None:
    print(f"\n{name}: {case}\n{'':<16}{'ms':>9}{'runs':>6}{'MB above inputs':>17}")
    for implementation, row in rows.items():
        if "not" in row:
            print(f"{implementation:<16}  {row['not']}")
            continue
        # So that NaN is told too.
        other = "" if row["difference"] < CLOSE else f"  {row['difference']:.0%} off the first"
        megabytes = row["peak_bytes_above_inputs"] / 1e6
        print(f"{implementation:<16}{row['ms']:>9.2f}{row['runs']:>6}{megabytes:>17.0f}{other}")
    mine = rows["scattermoe"]
    for implementation, row in rows.items():
        if implementation != "scattermoe" and "ms" in row and "ms" in mine:
            memory = mine["peak_bytes_above_inputs"] / row["peak_bytes_above_inputs"]
            ratio = row["ms"] / mine["ms"]
            print(f"{'':<16}{ratio:>8.2f}x {implementation}, with {memory:.0%} of its memory", flush=True)


def main() -> None:
    arguments, cases = parse_cases(comparison_parser(__doc__, list(CASES)), CASES, 2.0)
    if arguments.device == "cpu":
        print("liger is not compared: its kernels are Triton's, for GPUs alone", flush=True)

    def measured(kernel: Any, name: str, case: Case) -> dict[str, Any]:
        rows = measure(kernel, case, arguments.device, arguments.seconds)
        show(name, case, rows)
        return rows

    compare_cases(arguments, cases, measured)


if __name__ == "__main__":
    main()
