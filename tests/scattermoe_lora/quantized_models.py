"""Tiny models of experts, to be quantized, adapted, trained and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gemma4_models
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma4TextConfig, GptOssConfig, Qwen3MoeConfig

IDS = torch.arange(2 * 13).view(2, 13) * 7 % 61 + 2
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}


def qwen3(experts: int = 4, **sizes: int) -> Qwen3MoeConfig:
    """A checkpoint of it has a tensor for each expert."""
    return Qwen3MoeConfig(**{**SIZES, "moe_intermediate_size": 48, **sizes}, num_experts=experts)


def gpt_oss(experts: int = 4, **sizes: int) -> GptOssConfig:
    """Transposed weights, one tensor for all experts, with biases and a clamped gate."""
    return GptOssConfig(**{**SIZES, **sizes}, num_local_experts=experts)


def gemma4() -> Gemma4TextConfig:
    settings = {**gemma4_models.TEXT, **gemma4_models.KINDS["moe"], "num_hidden_layers": 2}
    return Gemma4TextConfig(**settings | {"layer_types": ["sliding_attention", "full_attention"]})


def build(config: Any, dtype: torch.dtype = torch.float32, experts: str = "scattermoe") -> Any:
    """A model of a configuration, in training mode."""
    return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=experts).train()


def save_dense(config: Any, folder: Path) -> tuple[Any, Path]:
    """A dense model in bfloat16, and a folder where it is saved."""
    model = build(config, torch.bfloat16, "eager")
    model.save_pretrained(folder / "dense")
    return model, folder / "dense"


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **arguments)


def stacks(model: Any) -> dict[str, Any]:
    """The quantized stacks of a model, by parameter."""
    return {name: p.stack for name, p in model.named_parameters() if hasattr(p, "stack")}


def assert_same_bits(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, stack in expected.items():
        assert (got[name].format, got[name].dtype) == (stack.format, stack.dtype)
        assert torch.equal(got[name].codes, stack.codes)
        assert torch.equal(got[name].scales[0], stack.scales[0])


def lora(**settings: Any) -> LoraConfig:
    settings = {"r": 3, "lora_alpha": 6, "target_parameters": TARGETS, "init_lora_weights": False} | settings
    return LoraConfig(**settings)


def adapted(model: Any, **settings: Any) -> Any:
    """The model with PEFT's LoRA on its experts, the same factors each time."""
    torch.manual_seed(1)
    return get_peft_model(model, lora(**settings))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def step(model: Any) -> list[torch.Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
