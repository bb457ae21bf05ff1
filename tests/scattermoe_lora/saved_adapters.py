"""Adapters of small models with experts, as PEFT saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gemma4_models
import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24}
EXPERTS = 4
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=24
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS)
    ),
    "gemma4": lambda: gemma4_models.build("moe"),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2)
    ),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]
needs_current_files = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"), reason="files of PEFT 0.20 and later"
)
"""PEFT before 0.20 takes the other dimension for a parameter's input; that is a test of its own."""


def save(base: Path, directory: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A random adapter of a saved model, as PEFT saves it."""
    defaults = {"r": 3, "lora_alpha": 6, "target_modules": LINEARS, "target_parameters": BOTH}
    lora = LoraConfig(**{**defaults, "init_lora_weights": False, **config})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(directory)
    return directory


def read(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def rewrite(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {k: t.clone().contiguous() for k, t in tensors.items()}, directory / "adapter_model.safetensors"
    )
