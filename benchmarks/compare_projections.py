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
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from interleaved import FirstResults, measure_in_turns, process_peak
from measuring import Alone, compare_cases, comparison_parser, parse_cases, run_beside_others

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
        model: The layer, PEFT's adapters on its projections if ``adapters``.
    """

    def __init__(self, case: Case, adapters: bool) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import Gemma4TextConfig
        from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

        dtype, self.adapters = getattr(torch, case.dtype), adapters
        config = Gemma4TextConfig(
            vocab_size=8,
            hidden_size=case.hidden,
            intermediate_size=case.intermediate,
            num_hidden_layers=1,
            # Two heads of queries to one of keys, as in Gemma 4.
            num_attention_heads=case.hidden // 512 * 2,
            num_key_value_heads=case.hidden // 512,
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

    def __call__(self) -> list[torch.Tensor]:
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


def measure(
    kernel: Any, case: Case, device: str, seconds: float, alone: Alone = run_beside_others
) -> dict[str, Any]:
    """A row for each layer, as of :func:`measure_in_turns`, with memory and the difference from PEFT's results."""

    def layer(name: str) -> Layer:
        # The seed gives all layers the same weights.
        with torch.device(device):
            result = Layer(case, name != "frozen")
        if name == "scattermoe":
            kernel.apply_to(result.model, "projections")
        return result

    first = FirstResults()

    def describe(layer: Layer) -> dict[str, Any]:
        results = layer()
        differs = {"difference": first.difference(results)} if layer.adapters else {}
        del results
        return {"peak_bytes": process_peak(layer, device), "saved_bytes": layer.saved_bytes(), **differs}

    makers = {name: partial(layer, name) for name in ("frozen", "peft", "scattermoe")}
    return measure_in_turns(makers, describe, device, seconds, alone)


def show(name: str, case: Case, rows: dict[str, Any]) -> None:
    print(
        f"\n{name}: {case}, r={RANK}\n{'':<12}{'ms':>9}{'runs':>6}{'LoRA adds':>11}"
        f"{'MB at peak':>12}{'MB kept for backward':>22}"
    )
    for implementation, row in rows.items():
        if "not" in row:
            print(f"{implementation:<12}  {row['not']}", flush=True)
            continue
        adds = "" if implementation == "frozen" else f"{row['of_first'] - 1:.1%}"
        print(
            f"{implementation:<12}{row['ms']:>9.2f}{row['runs']:>6}{adds:>11}{row['peak_bytes'] / 1e6:>12.0f}"
            f"{row['saved_bytes'] / 1e6:>22.1f}",
            flush=True,
        )
    # A bfloat16 step is compared as far as its own rounding allows.
    if "ms" in rows["scattermoe"]:
        difference = rows["scattermoe"]["difference"]
        print(f"{'':<12}largest difference of a tensor to PEFT's: {difference:.1e}", flush=True)


def leave_base_to_torch(kernel: Any) -> None:
    """Has the base product computed by torch everywhere."""
    importlib.import_module(f"{kernel.__name__}.ops.lora_linear.products").prefers_onednn = lambda: False


def main() -> None:
    parser = comparison_parser(__doc__, list(CASES))
    parser.add_argument(
        "--base", choices=("ours", "torch"), default="ours", help="the base product's library"
    )
    arguments, cases = parse_cases(parser, CASES, 20.0)

    def measured(kernel: Any, name: str, case: Case) -> dict[str, Any]:
        if arguments.base == "torch":
            leave_base_to_torch(kernel)
        rows = measure(kernel, case, arguments.device, arguments.seconds)
        show(name, case, rows)
        return rows

    compare_cases(arguments, cases, measured, base=arguments.base)


if __name__ == "__main__":
    main()
