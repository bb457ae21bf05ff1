"""Gemma 4's towers: adapters inside their clamped layers, and training on text alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gemma4_models import TEXT
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Gemma4Config, Gemma4ForConditionalGeneration


def multimodal() -> Any:
    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "use_clipped_linears": True,
    }
    config = Gemma4Config(
        text_config={**TEXT, "num_hidden_layers": 2, "layer_types": TEXT["layer_types"][:2]},
        vision_config={**tower, "patch_size": 4, "pooling_kernel_size": 1, "position_embedding_size": 64},
        audio_config=None,
    )
    return Gemma4ForConditionalGeneration(config).train()


def test_adapters_go_to_the_linear_inside_and_clamps_stay(kernel, tmp_path) -> None:
    model = multimodal()
    with pytest.raises(ValueError, match="Gemma4ClippableLinear"):
        get_peft_model(multimodal(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    targets = kernel.lora_targets(model, ["q_proj", "v_proj"])
    assert sum(name.endswith("q_proj.linear") for name in targets) == 1
    assert sum(name.endswith("q_proj") for name in targets) == 2
    assert kernel.lora_targets(model, r".*vision.*q_proj") == [
        n for n in targets if n.endswith("q_proj.linear")
    ]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    [clamped] = [m for n, m in adapted.named_modules() if n.endswith("q_proj") and hasattr(m, "linear")]
    clamped.linear.lora_B["default"].weight.data.normal_()
    clamped.output_max.fill_(0.25)
    x = torch.randn(3, 16)
    assert clamped(x).max() <= 0.25 < clamped.linear(x).max()
    # PEFT alone loads it.
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(multimodal(), tmp_path)
    [loaded] = [m for n, m in again.named_modules() if n.endswith("q_proj") and hasattr(m, "linear")]
    assert torch.equal(loaded.linear.lora_B["default"].weight, clamped.linear.lora_B["default"].weight)
    with pytest.raises(ValueError, match=r"lora_targets: expected patterns that match a module, got .'qkv'"):
        kernel.lora_targets(model, ["qkv"])


def test_a_text_step_reaches_every_parameter_that_is_not_frozen(kernel) -> None:
    model = multimodal()
    targets = kernel.lora_targets(model, ["q_proj", "v_proj"])
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    ids = torch.arange(2, 12).view(1, 10)

    def unreached() -> list[str]:
        adapted.zero_grad()
        types = torch.zeros_like(ids)
        adapted(input_ids=ids, labels=ids, mm_token_type_ids=types).loss.backward()
        return [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None]

    assert len(unreached()) == 4
    assert kernel.freeze_towers(adapted) == 4
    assert not unreached()
    assert kernel.freeze_towers(adapted) == 0
    with pytest.raises(
        ValueError, match="freeze_towers: expected a model with a language_model beside its towers"
    ):
        kernel.freeze_towers(torch.nn.Linear(2, 2))
