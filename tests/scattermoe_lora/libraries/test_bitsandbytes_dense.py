"""Dense layers that bitsandbytes quantized, with PEFT's adapters on them, run fused: projections, and the head."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import pytest
import torch
from gemma4_models import IDS, distance, step
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}


def quantize(model: Any, bits: int, *names: str) -> Any:
    """Linear layers replaced, as a model is that was loaded quantized."""
    for path, layer in list(model.named_modules()):
        if not path.endswith(names):
            continue
        shape = layer.in_features, layer.out_features
        if bits == 4:
            new = bitsandbytes.nn.Linear4bit(*shape, bias=False, quant_type="nf4", compress_statistics=True)
            new.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, False, quant_type="nf4", compress_statistics=True
            )
        else:
            new = bitsandbytes.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            new.weight = bitsandbytes.nn.Int8Params(layer.weight.data, False, has_fp16_weights=False)
        model.set_submodule(path, new.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def llama(**settings: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES, **settings)).train()


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_around_quantized_projections_train_as_pefts(kernel, bits) -> None:
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base = quantize(llama(), bits, *projections)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=projections, init_lora_weights=False))
    expected = step(model)
    assert len(expected) > 14
    assert kernel.apply_to(model, "projections") == 7
    assert distance(step(model), expected) < 1e-5
    model.to(torch.bfloat16)
    rough = step(model)
    kernel.remove_from(model)
    assert distance(rough, expected) < 2 * distance(step(model), expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_head_of_4_bits_is_decoded_by_parts_and_no_logits_are_made(
    kernel, submodule, monkeypatch, adapted
) -> None:
    model = quantize(llama(), 4, "lm_head")
    if adapted:
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        )
    expected = step(model)
    kernel.apply_to(model, "loss")
    sizes: list[int] = []
    decode = bitsandbytes.functional.dequantize_4bit

    def counted(packed: torch.Tensor, *arguments: Any) -> torch.Tensor:
        sizes.append(2 * packed.numel() // 64)
        return decode(packed, *arguments)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", counted)
    monkeypatch.setattr(submodule("ops.linear_cross_entropy.decoded"), "_PART_BYTES", 20 * 64 * 4)
    assert distance(step(model), expected) < 1e-5
    assert sorted(sizes) == [4, 4, *[20] * 6]
    twin = copy.deepcopy(model)
    assert twin(input_ids=IDS, labels=IDS).logits is None
    # An evaluation makes bitsandbytes pack the weight otherwise, on processors that multiply bfloat16.
    with torch.no_grad():
        model.eval()(input_ids=IDS, labels=IDS)
    fused = model.train()(input_ids=IDS, labels=IDS).loss
    kernel.remove_from(model)
    torch.testing.assert_close(fused, model(input_ids=IDS, labels=IDS).loss)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_head_of_8_bits_is_decoded_by_parts_and_no_logits_are_made(kernel, submodule, adapted) -> None:
    model = quantize(llama(), 8, "lm_head")
    if adapted:
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        )
    kernel.apply_to(model, "loss")
    # Before the layer's first call, which moves its codes, and after it.
    fused = [step(model)]
    kernel.remove_from(model)
    expected = step(model)
    kernel.apply_to(model, "loss")
    fused.append(step(model))
    assert max(distance(result, expected) for result in fused) < 1e-5
    assert model(input_ids=IDS, labels=IDS).logits is None
    head = submodule("integration.loss.heads").read(model.get_output_embeddings(), torch.float32)
    assert torch.equal(head.weight.decode(9, 33), head.weight.decode(0, 64)[9:33])
