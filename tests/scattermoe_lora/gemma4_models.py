"""Small Gemma 4 text models of every kind, and a training step of one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig
from transformers.models.gemma4 import modeling_gemma4

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "shared": {"num_hidden_layers": 6, "layer_types": TEXT["layer_types"] + TEXT["layer_types"][:2]}
    | {"num_kv_shared_layers": 3},
    "k=v": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "moe": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "per layer": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 2,
    },
}
SMALLEST = {"num_hidden_layers": 3, "num_kv_shared_layers": 1} | {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"]
}
IDS = torch.arange(2 * 21).view(2, 21) * 7 % 61 + 2


def build(kind: str = "shared", dtype: torch.dtype = torch.float32) -> Any:
    settings = SMALLEST if kind == "smallest" else KINDS[kind]
    model = Gemma4ForCausalLM(Gemma4TextConfig(**{**TEXT, **settings}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1, 0.3)
    return model.to(dtype).train()


def step(model: Any, **inputs: Any) -> list[torch.Tensor]:
    """The loss and all gradients, in the parameters' order."""
    model.zero_grad()
    loss = model(**({"input_ids": IDS, "labels": IDS} | inputs)).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert gradients
    return [loss.detach(), *gradients]


def distance(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    pairs = [(g.double(), e.double()) for g, e in zip(got, exact, strict=True)]
    return (
        float(sum((g - e).square().sum() for g, e in pairs) / sum(e.square().sum() for _, e in pairs)) ** 0.5
    )


def attentions(model: Any) -> list[Any]:
    """The model's text attention layers."""
    return [m for m in model.modules() if isinstance(m, modeling_gemma4.Gemma4TextAttention)]
