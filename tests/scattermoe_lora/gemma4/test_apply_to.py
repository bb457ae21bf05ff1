"""Gemma 4 models of every kind, their attention's norms and rotary embedding fused, against the same models without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gemma4_models import IDS, KINDS, TEXT, attentions, build, distance, step
from peft import LoraConfig, get_peft_model
from torch._dynamo.backends.debugging import aot_eager
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_same_and_gradients_are_as_exact(kernel, kind) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        model = build(kind, dtype)
        wide = copy.deepcopy(model).double()
        wide.set_experts_implementation("eager")  # grouped_mm has no float64
        exact = step(wide)
        plain = step(model)
        assert kernel.apply_to(model, "attention") == model.config.num_hidden_layers
        fused = step(model)
        assert torch.equal(fused[0], plain[0])
        assert distance(fused[1:], exact[1:]) < max(1.2 * distance(plain[1:], exact[1:]), 1e-6)
        assert distance(fused[1:], plain[1:]) < tolerance


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("shared", torch.float32), ("shared", torch.bfloat16), ("k=v", torch.bfloat16), ("moe", torch.float32)],
)
def test_generated_tokens_are_the_same_with_every_cache(kernel, kind, dtype) -> None:
    model = build(kind, dtype).eval()
    results = []
    for run in (kernel.apply_to, kernel.remove_from):
        run(model)
        for settings in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            # Past the sliding window, and with padding.
            mask = torch.ones(2, 9, dtype=torch.long)
            mask[0, :3] = 0
            settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None} | settings
            results.append(model.generate(IDS[:, :9], attention_mask=mask, **settings))
    assert all(torch.equal(fused, plain) for fused, plain in zip(results[:3], results[3:], strict=True))
    assert results[0].shape == (2, 21)


@pytest.mark.parametrize("kind", ["shared", "k=v"])
def test_with_lora_on_all_projections(kernel, kind) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(build(kind), config)
    plain = step(model)
    assert kernel.apply_to(model, "attention") == model.config.num_hidden_layers
    fused = step(model)
    assert len(fused) == 1 + sum("lora_" in name for name, _ in model.named_parameters())
    assert torch.equal(fused[0], plain[0])
    assert distance(fused, plain) < 1e-5


def test_with_every_attention_implementation(kernel) -> None:
    kernel.register_attention("apply_to_flash")
    try:
        for implementation in ("eager", "sdpa", "apply_to_flash"):
            model = build()
            model.set_attn_implementation(implementation)
            plain = step(model)
            kernel.apply_to(model, "attention")
            assert distance(step(model), plain) < 1e-5
    finally:
        kernel.unregister_attention()


@pytest.mark.parametrize("tower", [False, True])
def test_only_text_attention_of_a_multimodal_model_changes(kernel, tower) -> None:
    vision = Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    config = Gemma4Config(text_config=Gemma4TextConfig(**TEXT), vision_config=vision if tower else None)
    model = Gemma4ForConditionalGeneration(config).train()
    inputs = {"mm_token_type_ids": torch.zeros_like(IDS)}
    plain = step(model, **inputs)
    assert kernel.apply_to(model, "attention") == 4
    fused = step(model, **inputs)
    assert torch.equal(fused[0], plain[0])
    assert distance(fused, plain) < 1e-5


def test_the_unified_model_has_the_same_attention(kernel) -> None:
    unified = pytest.importorskip("transformers.models.gemma4_unified")
    settings = {key: value for key, value in TEXT.items() if key != "hidden_size_per_layer_input"}
    model = unified.Gemma4UnifiedForCausalLM(unified.Gemma4UnifiedTextConfig(**settings)).train()
    plain = step(model)
    assert kernel.apply_to(model, "attention") == 4
    got = step(model)
    assert torch.equal(got[0], plain[0])
    assert distance(got, plain) < 1e-5
    assert kernel.remove_from(model) == 4


def test_autocast(kernel) -> None:
    model = build()
    kernel.apply_to(model, "attention")
    with torch.autocast("cpu", torch.bfloat16):
        fused = step(model)
        kernel.remove_from(model)
        plain = step(model)
    assert torch.equal(fused[0], plain[0])
    assert distance(fused, plain) < 0.03


def test_float16_autocast_of_a_bfloat16_model(kernel) -> None:
    model = build("shared", torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        plain = step(model)
        kernel.apply_to(model, "attention")
        fused = step(model)
    assert torch.equal(fused[0], plain[0])
    assert distance(fused, plain) < 0.03


@pytest.mark.parametrize(
    ("dtype", "projected", "angles"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_projections_and_angles_of_different_dtypes_are_promoted(kernel, dtype, projected, angles) -> None:
    model = build("shared", dtype)
    model.set_attn_implementation("eager")
    model.model.rotary_emb.register_forward_hook(lambda module, args, out: tuple(t.to(angles) for t in out))
    for layer in attentions(model):
        # Attention wants keys and values of one dtype.
        both = torch.promote_types(projected, angles)
        for name, to in (("q_proj", projected), ("k_proj", projected), ("v_norm", both)):
            if hasattr(layer, name):
                getattr(layer, name).register_forward_hook(lambda module, args, out, to=to: out.to(to))
        layer.o_proj.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
    plain = step(model)
    kernel.apply_to(model, "attention")
    fused = step(model)
    assert torch.equal(fused[0], plain[0])
    assert distance(fused, plain) < (0.03 if dtype == torch.bfloat16 else 1e-5)


def test_whoever_asks_for_the_shared_states_gets_them(kernel) -> None:
    model = build()
    kernel.apply_to(model, "attention")
    states = model.model(IDS, return_shared_kv_states=True).shared_kv_states
    assert {kind: [list(t.shape) for t in pair] for kind, pair in states.items()} == {
        "sliding_attention": [[2, 2, 21, 16]] * 2,
        "full_attention": [[2, 2, 21, 32]] * 2,
    }


def test_outputs_that_transformers_records_are_recorded(kernel) -> None:
    model = build().eval()
    model.set_attn_implementation("eager")
    kernel.apply_to(model, "attention")
    out = model(IDS, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 6
    assert len(out.hidden_states) == 7
    kernel.remove_from(model)
    plain = model(IDS, output_attentions=True)
    assert all(torch.equal(a, b) for a, b in zip(out.attentions, plain.attentions, strict=True))


def test_compiled_model_has_the_operator_in_one_graph(kernel) -> None:
    model = build("smallest")
    kernel.apply_to(model, "attention")
    eager = step(model)
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    got = compiled(input_ids=IDS, labels=IDS, use_cache=False).loss
    assert torch.allclose(got, eager[0], rtol=1e-6)
    targets = [str(node.target) for node in graphs[-1].graph.nodes]
    # Three queries, two keys and two values.
    assert sum("norm_rotary_forward" in target for target in targets) == 7
