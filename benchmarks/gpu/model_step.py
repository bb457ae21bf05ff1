"""Training steps of Gemma 4 26B-A4B at its real size on one card, as ``recipes/gemma4_26b_qlora.py`` takes them.

    PYTHONPATH=benchmarks:torch-ext:tools python -m gpu.model_step --device cuda --card 80 [--eager] [--output FILE]

The weights are random and made on the card: codes and scales of the experts in NF4, linear layers in NF4 where
bitsandbytes is installed, and the rest in bfloat16; the dense model never exists. The adapters, their dtype, the
checkpointing, the optimizer, and rows and tokens for a card of 24 or 80 GB are the recipe's; all steps are of the same
random tokens, so that the loss falls. Without TRL, which has a loss of its own, the loss is the kernel's, and in eager
mode transformers'. Figures are written after each phase, in the format of ``recipes/measure.py``.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compare_attention import dense_rate
from measuring import (
    REPOSITORY,
    built_kernel,
    comparison_parser,
    device_name,
    installed,
    peak_memory,
    provenance,
    require,
    start_memory,
    write,
)

from gpu.stages import cores

MODEL = "gemma-4-26B-A4B"
# The recipe's name in recipes/plan.py.
PLAN = "qlora-8bit"
# Rows and tokens of a step by the card's memory in GB, as in the recipe.
ROWS = {24: (1, 2048), 80: (2, 8192)}
RANK = 16
# What the process may take, so that the rest of the card is left to others.
MOST_BYTES = 70e9
WARM_UP_STEPS = 2
# No step begins later than so long after the first.
PHASE_SECONDS = 20.0
LEARNING_RATE = 2e-4
# The standard deviation of quantized weights, which is that of the model's own initialization, too.
STD = 0.02
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_global_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32, "sliding_window": 32, "num_experts": 8,
    "top_k_experts": 2, "moe_intermediate_size": 64,
}  # fmt: skip
IMPLEMENTATIONS = {
    "ours": {"attn_implementation": "scattermoe", "experts_implementation": "scattermoe"},
    # The fastest of transformers' own; PEFT adds the adapters to all experts' weights.
    "eager": {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"},
}


@dataclass(frozen=True)
class Setting:
    """The sizes of a run: rows and tokens of a step, and steps; its device, and the dtype of what is not quantized."""

    batch: int
    length: int
    steps: int
    device: str
    dtype: torch.dtype

    @property
    def four_bits(self) -> bool:
        """True if linear layers are bitsandbytes', in 4 bits."""
        return find_spec("bitsandbytes") is not None


def say(text: str) -> None:
    print(f"{time.perf_counter() - BEGIN:6.1f} s  {text}", flush=True)


BEGIN = time.perf_counter()


def configuration(layers: int | None, tiny: bool) -> Any:
    """The model's configuration; of fewer layers the last ones, so that every sixth still looks at all tokens."""
    from transformers import AutoConfig

    path = REPOSITORY / "recipes" / "configs" / f"{MODEL}.json"
    values = json.loads(path.read_text("utf-8"))
    text = values["text_config"] | (TINY if tiny else {})
    text["layer_types"] = text["layer_types"][-(layers or 0) :]
    text["num_hidden_layers"] = len(text["layer_types"])
    return AutoConfig.for_model(**{**values, "text_config": text})


def build(config: Any, implementation: str, setting: Setting, kernel: Any) -> Any:
    """The frozen model with random weights, and the recipe's adapters on it.

    Args:
        config: Of the model.
        implementation: A key of :data:`IMPLEMENTATIONS`.
        setting: Says on which device and in which dtype.
        kernel: The package, registered.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = IMPLEMENTATIONS[implementation]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype, **settings)
    if setting.four_bits:
        quantize_linears(model, setting)
    materialize(model, setting.device, kernel)
    model.requires_grad_(False)
    lora = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=r".*language_model.*\.[qkvo]_proj",
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    adapted = get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            # As TRL has the adapters of a quantized model.
            parameter.data = parameter.data.to(setting.dtype)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    if implementation == "ours":
        kernel.apply_to(adapted, "attention", "mlp", "norm", "projections", "loss")
    return adapted.train()


def quantize_linears(model: Any, setting: Setting) -> None:
    """Replaces the linear layers that the recipe quantizes by bitsandbytes', random, one dense at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=setting.dtype
    )
    replace_with_bnb_linear(model, ["lm_head", "router"], config)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            shape = layer.out_features, layer.in_features
            dense = torch.empty(shape, dtype=setting.dtype, device=setting.device).normal_(std=STD)
            weight = Params4bit(dense, requires_grad=False, **vars(layer.weight))
            layer.weight = weight.to(setting.device)
            layer._is_hf_initialized = True
    # By this PEFT knows that adapters stand beside such layers.
    model.is_loaded_in_4bit = True


def materialize(model: Any, device: str, kernel: Any) -> None:
    """Gives every tensor of a model on the meta device memory and initial values: experts random codes, in NF4."""
    quantized_weight = importlib.import_module(
        f"{kernel.__name__}.integration.experts.quantized.parameter"
    ).QuantizedWeight
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            for name, parameter in list(module.named_parameters(recurse=False)):
                weight = quantized_weight(random_stack(parameter, device, kernel))
                setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
            module._is_hf_initialized = True
            continue
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    empty = torch.empty_like(tensor, device=device)
                    tensors[name] = (
                        torch.nn.Parameter(empty) if isinstance(tensor, torch.nn.Parameter) else empty
                    )
    model.tie_weights()
    # Rotary frequencies and the embeddings' scale, buffers that no checkpoint has, are computed here, too.
    model.initialize_weights()


def random_stack(parameter: torch.Tensor, device: str, kernel: Any) -> Any:
    """A stack of random codes in an expert parameter's shape and dtype, whose standard deviation is :data:`STD`."""
    encode, formats, stack = (
        importlib.import_module(f"{kernel.__name__}.ops.quantization.{name}")
        for name in ("encode", "formats", "stack")
    )
    experts, rows, columns = parameter.shape
    codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=device)
    mean_square = statistics.fmean(value**2 for value in formats.ELEMENTS["nf4"].values)
    scales = torch.empty(-(-parameter.numel() // encode.FLAT_BLOCK), dtype=torch.float32, device=device)
    scales.uniform_(0.8, 1.2).mul_(STD / mean_square**0.5)
    return stack.QuantizedStack(codes, (scales,), encode.layout_of("nf4"), parameter.dtype)


def optimizer_of(model: Any, setting: Setting) -> torch.optim.Optimizer:
    """AdamW with states of 8 bits where bitsandbytes is installed and there is a GPU, else torch's."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if setting.four_bits and setting.device == "cuda":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=LEARNING_RATE)
    return torch.optim.AdamW(trained, lr=LEARNING_RATE)


class Loaders(ThreadPoolExecutor):
    """Threads that compile a kernel, and what launches it, and load both."""

    def submit(self, compiled: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        def load() -> Any:
            kernel = compiled()
            _ = kernel.run
            return kernel

        return super().submit(load)


@contextmanager
def compiling(kernel: Any, pool: ThreadPoolExecutor) -> Iterator[None]:
    """Kernels that are called are compiled, side by side, and not launched; on return all are.

    What they would have written is what was in memory, so nothing may be indexed by it. The backward runs in this
    thread, where Triton looks for how to compile.
    """
    from triton import AsyncCompileMode

    from gpu.sweep import Launcher, unwritten_product

    library = importlib.import_module(f"{kernel.__name__}.ops.grouped_linear.library")
    with (
        pool,
        Launcher(never=True),
        mock.patch.object(library, "product", unwritten_product),
        torch.autograd.set_multithreading_enabled(False),
        AsyncCompileMode(pool),
    ):
        yield


class Training:
    """A model, its optimizer and one batch."""

    def __init__(self, model: Any, setting: Setting) -> None:
        self.model, self.optimizer = model, optimizer_of(model, setting)
        words = model.config.get_text_config().vocab_size
        self.ids = torch.randint(0, words, (setting.batch, setting.length), device=setting.device)

    def backward(self) -> torch.Tensor:
        """The loss; its gradients are added to the parameters'."""
        loss: torch.Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def step(self) -> float:
        """One step of the optimizer; the loss before it."""
        loss = self.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Waits for the device.
        return loss.item()


def train(training: Training, setting: Setting) -> dict[str, Any]:
    """Losses, milliseconds and peak memory of steps, of which none begins after :data:`PHASE_SECONDS`."""
    losses: list[float] = []
    moments = [time.perf_counter()]
    before = start_memory(setting.device) if setting.device == "cpu" else 0
    while len(losses) < setting.steps and moments[-1] - moments[0] < PHASE_SECONDS:
        losses.append(training.step())
        moments.append(time.perf_counter())
        say(f"loss {losses[-1]:.4f}, {1000 * (moments[-1] - moments[-2]):.0f} ms")
    steps = [after - before for before, after in itertools.pairwise(moments)]
    return {
        "losses": losses,
        "ms_per_step": 1000 * statistics.median(steps[WARM_UP_STEPS:] or steps),
        "peak_bytes": peak_memory(setting.device) - before,
    }


def measure(config: Any, implementation: str, setting: Setting, kernel: Any) -> dict[str, Any]:
    """Builds the model, compiles the kernels of its step where there is a GPU, and trains it."""
    torch.manual_seed(0)
    start_memory(setting.device)
    training = Training(build(config, implementation, setting, kernel), setting)
    if setting.device == "cuda":
        torch.cuda.synchronize()
        say(f"{implementation}: {torch.cuda.memory_allocated() / 1e9:.1f} GB of weights and adapters")
        if implementation == "ours":
            with compiling(kernel, Loaders(cores())):
                training.backward()
            training.optimizer.zero_grad()
            say("compiled")
        start_memory(setting.device)
    return train(training, setting)


def planned(config: Any, setting: Setting) -> dict[str, Any]:
    """The parameters, and what recipes/plan.py foresees of the kernel's steps.

    Bytes are those of tensors, as ``peak_bytes`` counts them; operations are those of all matrix products.
    """
    sys.path.insert(0, str(REPOSITORY / "recipes"))
    import plan

    setup = plan.Setup(rank=RANK, dtype=str(setting.dtype).removeprefix("torch."), device=setting.device)
    foreseen = plan.Planner(config, PLAN, setup).plan(setting.batch, setting.length)
    once = plan.Planner(config, PLAN, replace(setup, checkpointing=False)).step(1, setting.length)
    beside = ("allocator's slack", "CUDA context and libraries")
    return {
        "parameters": sum(count for part, count in foreseen.parameters.items() if part != "adapters"),
        "planned_bytes": foreseen.peak - sum(foreseen.parts.get(part, 0) for part in beside),
        "operations": foreseen.operations,
        "operations_once": setting.batch * sum(operations for operations, _ in once.work),
    }


def main() -> None:
    parser = comparison_parser(__doc__, ("cpu", "cuda"))
    parser.add_argument("--card", type=int, choices=list(ROWS), default=80, help="its memory in GB")
    parser.add_argument("--layers", type=int, help="the last ones of the model's")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--eager", action="store_true", help="run transformers' own code too, to compare")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    given = parser.parse_args()
    require(given.device)
    batch, length = (2, 64) if given.tiny else ROWS[given.card]
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    setting = Setting(batch, length, given.steps, given.device, dtype)
    config = configuration(given.layers, given.tiny)
    if given.device == "cuda":
        fraction = MOST_BYTES / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0))
    figures: dict[str, Any] = {
        "recipe": f"gemma4_26b_qlora, {config.text_config.num_hidden_layers} layers, {batch} x {length}",
        "command": " ".join(["python -m gpu.model_step", *sys.argv[1:]]),
        "device": device_name(given.device),
        "warning": warning_of(setting),
        "losses": {}, "ms_per_step": {}, "peak_bytes": {}, "refused": {},
        **planned(config, setting),
        "dense_tflops": dense_rate(str(dtype).removeprefix("torch."), given.device) / 1e12,
    }  # fmt: skip
    say(
        f"{figures['parameters'] / 1e9:.2f} billion parameters, {figures['planned_bytes'] / 1e9:.1f} GB planned"
    )
    with own_kernel() as kernel:
        kernel.register()
        kernel.register_attention("scattermoe")
        for implementation in list(IMPLEMENTATIONS)[: 1 + given.eager]:
            try:
                row = measure(config, implementation, setting, kernel)
            except torch.OutOfMemoryError as error:
                figures["refused"][implementation] = str(error).partition(". ")[0]
            else:
                for name, value in row.items():
                    figures[name][implementation] = value
            figures["about"] = about(figures, batch * length)
            save(given.output, figures)
    print(figures["about"])
    if "ours" in figures["refused"]:
        sys.exit(1)


def own_kernel() -> AbstractContextManager[Any]:
    """The kernel that the environment names, or one that is built for the while."""
    if "LOCAL_KERNELS" not in os.environ:
        return built_kernel()
    from kernels import get_kernel

    return nullcontext(get_kernel("org/scattermoe-lora", version=1))


def warning_of(setting: Setting) -> str:
    """The caveats that stand beside the figures."""
    linears = "NF4 by bitsandbytes" if setting.four_bits else str(setting.dtype).removeprefix("torch.")
    return (
        f"Random weights and tokens; experts in NF4, linear layers in {linears}. Eager is transformers' sdpa and "
        "grouped_mm with PEFT's own LoRA and all logits. The plan is of linear layers in NF4 and AdamW in 8 bits."
    )


def about(figures: dict[str, Any], tokens: int) -> str:
    """The figures that are no column of a recipe's table, in words."""
    dense = figures["dense_tflops"]
    results = []
    for name, milliseconds in figures["ms_per_step"].items():
        shares = [
            f"{figures[key] / milliseconds / 1e9 / dense:.0%}" for key in ("operations", "operations_once")
        ]
        results.append(
            f"{name} {1000 * tokens / milliseconds:,.0f} tokens a second, {' and '.join(shares)} of the dense rate"
        )
    results += [f"{name} not: {reason}" for name, reason in figures["refused"].items()]
    return (
        f"{'; '.join(results)}. That is {dense:.3g} TFLOP/s, measured beside them, and of the step "
        f"{figures['operations'] / 1e12:.3g} TFLOP of matrix products, as recipes/plan.py counts them, or "
        f"{figures['operations_once'] / 1e12:.3g} without those that checkpointing repeats."
    )


def save(output: Path | None, figures: dict[str, Any]) -> None:
    """Writes the figures so far, if anywhere, with where and when they were measured."""
    versions = {**provenance()["versions"], "bitsandbytes": installed("bitsandbytes")}
    write(output, {**figures, "versions": versions})


if __name__ == "__main__":
    main()
