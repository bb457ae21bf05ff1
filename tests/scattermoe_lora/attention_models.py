"""Small models of many kinds, and comparisons with eager mode, for the tests of registered attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)

FLASH = "scattermoe_flash"
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# Of packed sequences.
LENGTHS = (5, 1, 7)
SLIDING = ["sliding_attention", "full_attention"]


def gemma4(layers: int = 2, **more: Any) -> Gemma4TextConfig:
    return Gemma4TextConfig(
        **{**SMALL, "num_hidden_layers": layers},
        layer_types=SLIDING * (layers // 2),
        sliding_window=5,
        **{
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 64,
            **more,
        },
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma4 dense": lambda: gemma4(),
    "gemma4 head_dim 512": lambda: gemma4(global_head_dim=512),
    "gemma4 moe": lambda: gemma4(
        num_experts=4, top_k_experts=2, moe_intermediate_size=24, enable_moe_block=True
    ),
    "gemma4 shared KV": lambda: gemma4(layers=4, num_kv_shared_layers=2, use_double_wide_mlp=True),
    "gemma4 K=V": lambda: gemma4(attention_k_eq_v=True, num_global_key_value_heads=1),
    "gemma4 per-layer inputs": lambda: gemma4(hidden_size_per_layer_input=8),
    "gemma4 bidirectional": lambda: gemma4(use_bidirectional_attention="all"),
    "gemma2 softcap": lambda: Gemma2Config(**SMALL, sliding_window=5, attn_logit_softcapping=2.0),
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    # Its layers do not tell their attention of the window: only the mask does.
    "qwen2 moe": lambda: Qwen2MoeConfig(
        **SMALL,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=0,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=5),
}
SEVERAL = ["gemma4 shared KV", "gemma4 K=V", "qwen3"]


def model(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=FLASH)
    # Weights as small as those of a new model leave attention all but uniform.
    for parameter in built.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return built


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(7))


def labels_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The tokens that follow a token: neither padding nor the first after it, which padding would have to predict."""
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return ids.masked_fill((mask == 0) | (before == 0), -100)


def results(model: Any, implementation: str, **inputs: Any) -> list[torch.Tensor]:
    """Loss and gradients."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_trains_as_eager(model: Any, implementation: str = FLASH, **inputs: Any) -> None:
    assert_close(results(model, implementation, **inputs), results(model, "eager", **inputs), 1e-3)


def outputs(model: Any, run: Callable[[], torch.Tensor], implementation: str = FLASH) -> list[torch.Tensor]:
    """The results of ``run`` with our attention and with eager mode."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    results = []
    for name in (implementation, "eager"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(run())
    return results
