"""What plan.py predicts for training steps of small models, and what torch's CPU allocator hands out in the real ones.

.venv/bin/python tests/recipes/measured_steps.py                # every model, kernel, length and checkpointing
.venv/bin/python tests/recipes/measured_steps.py --mid-size     # some of 140 to 340 million parameters, minutes
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from torch.profiler import ProfilerActivity, profile

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "recipes"))

import plan  # noqa: E402

SMALL = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MOE = {"moe_intermediate_size": 64, "num_experts": 8}
GEMMA = {**SMALL, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2} | {
    "sliding_window": 64,
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 0,
}
TOWER_LESS = {"vision_config": None, "audio_config": None}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", SMALL),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**SMALL, **MOE, "num_experts_per_tok": 2}),
    "Mixtral": ("MixtralForCausalLM", {**SMALL, "num_local_experts": 4}),
    "gpt-oss": ("GptOssForCausalLM", {**SMALL, "intermediate_size": 128, "num_local_experts": 8}),
    "Gemma 4 dense": ("Gemma4ForCausalLM", {**GEMMA, "final_logit_softcapping": 30.0}),
    "Gemma 4 MoE": (
        "Gemma4ForConditionalGeneration",
        {"text_config": {**GEMMA, **MOE, "enable_moe_block": True, "top_k_experts": 2}, **TOWER_LESS},
    ),
    "Gemma 4 E4B": (
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {**GEMMA, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2}
            | {"vocab_size_per_layer_input": 1024},
            **TOWER_LESS,
        },
    ),
}
# What a model of 140 to 340 million parameters has, as far as its configuration has the attribute.
MID_SIZE = {"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8} | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 512,
    "num_experts": 16,
    "sliding_window": 256,
    "global_head_dim": 256,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
}
MID_SIZE_STEPS = (
    ("Qwen3-MoE", "lora", "float32", "ours", True, (1, 256)),
    ("Gemma 4 MoE", "lora", "float32", "ours", True, (1, 256)),
    ("Gemma 4 dense", "lora", "float32", "ours", False, (1, 256)),
    ("Gemma 4 MoE", "full", "float32", "eager", True, (1, 256)),
    ("Llama", "full", "float32", "ours", True, (2, 512)),
)
KERNELS = {
    "ours": {},
    "eager": {"attention": "eager", "experts": "eager", "parts": ()},
    "defaults": {"attention": "sdpa", "experts": "grouped_mm", "parts": ()},
}


def config(name: str, mid_size: bool = False) -> Any:
    """The configuration of a model, small or mid-size."""
    architecture, settings = CONFIGS[name]
    if mid_size:
        text = settings.get("text_config", settings)
        grown = text | {name: value for name, value in MID_SIZE.items() if name in text}
        settings = settings | {"text_config": grown} if "text_config" in settings else grown
    result = getattr(transformers, architecture).config_class(**settings)
    result.architectures = [architecture]
    return result


def setup(name: str, kernels: str, **settings: Any) -> plan.Setup:
    """The setup of a run on this computer."""
    values = {**KERNELS[kernels], "device": "cpu", **settings}
    if name == "gpt-oss" and kernels != "eager":
        # Its attention has sinks, which neither torch's nor our kernel's knows.
        values["attention"] = "eager"
    return plan.Setup(**values)


def measured_peak(config: Any, recipe: str, setup: plan.Setup, shape: tuple[int, int], kernel: Any) -> int:
    """The most bytes that the allocator had handed out at a time in a step, beyond what there was before."""
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])._from_config(
        config,
        dtype=getattr(torch, setup.dtype),
        attn_implementation=setup.attention,
        **({"experts_implementation": setup.experts} if "experts" in setup_parts(config) else {}),
    )
    planned = plan.build(config, plan.RECIPES[recipe], setup)
    if plan.RECIPES[recipe].adapters:
        lora = LoraConfig(
            r=setup.rank,
            lora_alpha=2 * setup.rank,
            target_modules=[n for n, m in planned.named_modules() if hasattr(m, "lora_a")],
            target_parameters=[
                n for n, p in planned.named_parameters() if p.plan_part == "experts" and p.dim() == 3
            ]
            or None,
        )
        inject_adapter_in_model(lora, model)
        for parameter in model.parameters():
            # As get_peft_model does.
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    model.train()
    for module in model.modules():
        if plan.is_experts(module):
            module.register_forward_pre_hook(_balance, with_kwargs=True)
    has_part = {
        "attention": config.model_type.startswith("gemma4"),
        "mlp": any(plan.is_mlp(module) for module in planned.modules()),
        "projections": any(hasattr(module, "lora_a") for module in planned.modules()),
    }
    if parts := [part for part in setup.parts if has_part.get(part, True)]:
        kernel.apply_to(model, *parts)
    if setup.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 1000, shape)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def _balance(module: Any, args: Any, kwargs: Any) -> Any:
    """Gives each expert the same number of tokens, as plan.py assumes, whatever the router chose."""

    def balanced(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.is_floating_point():
            return x
        return torch.arange(x.numel()).view(x.shape) % module.num_experts

    return tuple(map(balanced, args)), {name: balanced(x) for name, x in kwargs.items()}


def setup_parts(config: Any) -> set[str]:
    """``experts`` for a configuration of a model that has some."""
    text = config.get_text_config()
    has_experts = any(hasattr(text, name) for name in ("num_local_experts", "moe_intermediate_size"))
    return {"experts"} if has_experts and getattr(text, "enable_moe_block", True) else set()


def predicted_peak(config: Any, recipe: str, setup: plan.Setup, shape: tuple[int, int]) -> int:
    """The same by plan.py."""
    planner = plan.Planner(config, recipe, setup)
    return sum(planner.step(*shape).peak.values())


def small_steps() -> Iterator[tuple[Any, ...]]:
    """Every step that a small model takes here: model, recipe, dtype, kernels, checkpointing, rows and tokens."""
    for step in itertools.product(
        CONFIGS,
        ("lora", "full"),
        ("float32", "bfloat16"),
        KERNELS,
        (False, True),
        ((1, 128), (2, 200), (4, 256)),
    ):
        _, recipe, dtype, kernels, *_ = step
        # grouped_mm on meta takes bfloat16 alone, and PEFT merges.
        if kernels != "defaults" or (dtype == "bfloat16" and recipe == "full"):
            yield step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mid-size", action="store_true", help="fewer and larger models")
    mid_size = parser.parse_args().mid_size
    sys.path.insert(0, str(REPOSITORY / "torch-ext"))
    import scattermoe_lora as kernel

    kernel.register()
    kernel.register_attention()
    print(
        "| model | recipe | dtype | kernels | checkpointing | tokens | predicted MB | measured MB | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    ratios = []
    for name, recipe, dtype, kernels, checkpointing, shape in MID_SIZE_STEPS if mid_size else small_steps():
        run = setup(name, kernels, checkpointing=checkpointing, dtype=dtype)
        predicted = predicted_peak(config(name, mid_size), recipe, run, shape)
        measured = measured_peak(config(name, mid_size), recipe, run, shape, kernel)
        ratios.append(predicted / measured)
        print(
            f"| {name} | {recipe} | {dtype} | {kernels} | {'yes' if checkpointing else 'no'} | "
            f"{shape[0]} x {shape[1]} | {predicted / 1e6:.2f} | {measured / 1e6:.2f} | {ratios[-1]:.3f} |",
            flush=True,
        )
    within = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    print(
        f"\n{len(ratios)} steps: ratios from {min(ratios):.3f} to {max(ratios):.3f}, median "
        f"{statistics.median(ratios):.3f}; {within} within a tenth."
    )


if __name__ == "__main__":
    main()
