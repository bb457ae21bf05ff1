"""Eager attention is found for layers whose class was made elsewhere than the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attention_models import CONFIGS, FLASH, model, tokens
from helpers import assert_close
from torch.distributed.fsdp import fully_shard


def fused(model: Any, kernel: Any) -> None:
    assert kernel.apply_to(model, "attention") == len(model.model.layers)


def subclassed(model: Any, kernel: Any) -> None:
    for layer in model.model.layers:
        plain = type(layer.self_attn)
        layer.self_attn.__class__ = type(f"My{plain.__name__}", (plain,), {"__module__": __name__})


def of_a_module_that_is_gone(model: Any, kernel: Any) -> None:
    for layer in model.model.layers:
        plain = type(layer.self_attn)
        layer.self_attn.__class__ = type(f"My{plain.__name__}", (plain,), {"__module__": "a_notebook_cell"})


def sharded(model: Any, kernel: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer.self_attn)


@pytest.fixture
def group() -> Any:
    """A process group of this process alone, which FSDP2 needs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma4 shared KV", fused),
        ("gemma4 shared KV", subclassed),
        ("llama", of_a_module_that_is_gone),
        ("gemma4 K=V", sharded),
        ("llama", sharded),
    ],
)
def test_attention_weights_are_those_of_eager(
    attention, group, name: str, change: Callable[[Any, Any], None]
) -> None:
    m, ids = model(CONFIGS[name]()), tokens(2, 13)
    m.set_attn_implementation("eager")
    eager = m(input_ids=ids, output_attentions=True)
    change(m, attention)
    m.set_attn_implementation(FLASH)
    ours = m(input_ids=ids, output_attentions=True)
    assert_close([ours.logits, *ours.attentions], [eager.logits, *eager.attentions], 1e-4)
    assert len(ours.attentions) == m.config.num_hidden_layers


def test_a_layer_without_any_is_refused_by_name(attention, submodule) -> None:
    class Lonely(torch.nn.Module):
        is_causal = True

    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match="Lonely needs an eager attention"):
        submodule("integration.attention.forward").attention_forward(
            Lonely(), q, q, q, None, output_attentions=True
        )
