"""What LoRA on the projections adds to a step of a dense Gemma 4 layer, through PEFT and through ours.

Adapters of rank 16 on all seven projections of a frozen decoder layer, forward and backward. The frozen layer without
adapters, PEFT's and ours run in turns in one process, on the same tensors: a layer's addition is its median time over
the frozen one's. The frozen layer's products are torch's own: where ours are another library's (float32 on some
processors), the base product is faster, too, and the addition can be negative; ``--base torch`` leaves the base product
to torch everywhere. Prints a table; ``--output`` also writes the figures as JSON, with the date, the device, the
versions and the commit they belong to.

    python benchmarks/compare_projections.py [--device cuda] [--cases fp32,bf16] [--base torch] [--output FILE]
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measuring import (
    LAUNCHES,
    compare_cases,
    comparison_parser,
    count_for,
    parse_cases,
    peak_memory,
    seconds_each,
    start_memory,
)

RANK = 16


@dataclass(frozen=True)
class Case:
    """One layer, and the dtypes of its weights and of its adapters."""

    hidden: int
    intermediate: int
    tokens: int
    dtype: str
    # PEFT makes adapters float32 unless it is told otherwise.
    adapter_dtype: str = "float32"


CASES = {
    "cpu": {
        "fp32": Case(1024, 4096, 1024, "float32"),
        "bf16": Case(1024, 4096, 1024, "bfloat16"),
        "bf16-adapters": Case(1024, 4096, 1024, "bfloat16", "bfloat16"),
    },
    "cuda": {
        "bf16": Case(2816, 11264, 8192, "bfloat16"),
        "bf16-adapters": Case(2816, 11264, 8192, "bfloat16", "bfloat16"),
        "fp32": Case(1024, 4096, 8192, "float32"),
    },
}


class Layer:
    """A frozen decoder layer of Gemma 4 and its inputs.

    Attributes:
        model: The layer, PEFT's adapters on its projections if there are any.
    """

    def __init__(self, case: Case, adapters: bool) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import Gemma4TextConfig
        from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

        dtype = getattr(torch, case.dtype)
        config = Gemma4TextConfig(
            vocab_size=8,
            hidden_size=case.hidden,
            intermediate_size=case.intermediate,
            num_hidden_layers=1,
            num_attention_heads=case.hidden // 256,
            num_key_value_heads=max(1, case.hidden // 512),
            head_dim=256,
            hidden_size_per_layer_input=0,
            layer_types=["sliding_attention"],
            sliding_window=1024,
        )
        torch.manual_seed(0)
        self.model: Any = Gemma4TextModel(config).to(dtype).requires_grad_(False)
        if adapters:
            names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
            lora = LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules=list(names), init_lora_weights=False
            )
            self.model = inject_adapter_in_model(lora, self.model)
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(getattr(torch, case.adapter_dtype))
        self.x = torch.randn(1, case.tokens, case.hidden).to(dtype).requires_grad_()
        self.grad = torch.randn(1, case.tokens, case.hidden).to(dtype)

    def step(self) -> list[torch.Tensor]:
        """The output and the gradients of the input and the adapters."""
        y = self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state
        leaves = [self.x, *(p for p in self.model.parameters() if p.requires_grad)]
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad)]

    def saved_bytes(self) -> int:
        """The bytes that the forward keeps for the backward, beside parameters and the input."""
        own = {p.untyped_storage().data_ptr() for p in (*self.model.parameters(), self.x)}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state
        total = sum(saved.values())
        del y
        return total


def difference(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest error of a tensor, its norm over that of the exact one."""
    return max(
        float((g.double() - e.double()).norm() / e.double().norm()) for g, e in zip(got, exact, strict=True)
    )


def measure(kernel: Any, case: Case, device: str, seconds: float, base: str) -> dict[str, Any]:
    """A row for each layer: its time, its addition to the frozen layer's, and memory."""
    if base == "torch":
        importlib.import_module(f"{kernel.__name__}.ops.lora_linear.products").prefers_onednn = lambda: False
    with torch.device(device):
        layers = {"frozen": Layer(case, False), "peft": Layer(case, True), "scattermoe": Layer(case, True)}
    layers["scattermoe"].model.load_state_dict(layers["peft"].model.state_dict())
    kernel.apply_to(layers["scattermoe"].model, "projections")
    finish: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows: dict[str, Any] = {}
    for name, layer in layers.items():
        layer.step()
        finish()
        before = start_memory(device)
        layer.step()
        finish()
        rows[name] = {
            "peak_bytes": peak_memory(device) - before,
            "saved_bytes": layer.saved_bytes(),
        }
    # A bfloat16 step is compared as far as its own rounding allows.
    rows["scattermoe"]["difference"] = difference(layers["scattermoe"].step(), layers["peft"].step())
    count = count_for(layers["frozen"].step, finish, LAUNCHES[device])
    times: dict[str, list[float]] = {name: [] for name in layers}
    while sum(times["frozen"]) * count * len(layers) < seconds or len(times["frozen"]) < 7:
        for name, layer in layers.items():
            times[name].append(seconds_each(layer.step, finish, count))
    for name, measured in times.items():
        # Of each round, in which the machine was as busy for one layer as for the other.
        ratios = [own / frozen for own, frozen in zip(measured, times["frozen"], strict=True)]
        rows[name].update(
            ms=1000 * statistics.median(measured),
            runs=len(measured),
            adds=statistics.median(ratios) - 1,
        )
    return rows


def show(name: str, case: Case, rows: dict[str, Any]) -> None:
    print(
        f"\n{name}: {case}, r={RANK}\n{'':<12}{'ms':>9}{'runs':>6}{'LoRA adds':>11}"
        f"{'MB at peak':>12}{'MB kept for backward':>22}"
    )
    for implementation, row in rows.items():
        adds = "" if implementation == "frozen" else f"{row['adds']:.1%}"
        print(
            f"{implementation:<12}{row['ms']:>9.2f}{row['runs']:>6}{adds:>11}{row['peak_bytes'] / 1e6:>12.0f}"
            f"{row['saved_bytes'] / 1e6:>22.1f}",
            flush=True,
        )
    print(
        f"{'':<12}largest difference of a tensor to PEFT's: {rows['scattermoe']['difference']:.1e}",
        flush=True,
    )


def main() -> None:
    parser = comparison_parser(__doc__, list(CASES))
    parser.add_argument(
        "--base", choices=("ours", "torch"), default="ours", help="the base product's library"
    )
    arguments, cases = parse_cases(parser, CASES, 20.0)

    def measured(kernel: Any, name: str, case: Case) -> dict[str, Any]:
        rows = measure(kernel, case, arguments.device, arguments.seconds, arguments.base)
        show(name, case, rows)
        return rows

    compare_cases(arguments, cases, measured, base=arguments.base)


if __name__ == "__main__":
    main()
