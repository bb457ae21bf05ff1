"""Dense layers that are kept in float8, with PEFT's adapters on them, run fused: projections, and the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gemma4_models import IDS, distance, step
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import finegrained_fp8

# All of it runs fused.
pytestmark = pytest.mark.filterwarnings("error:scattermoe. a projection runs through")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1, initializer_range=0.2)).train()


def float8(layer: torch.nn.Linear, block: list[int] | None, scale_fmt: str) -> torch.nn.Linear:
    """The layer as fine-grained FP8 checkpoints have it."""
    new = finegrained_fp8.FP8Linear(
        layer.in_features, layer.out_features, block, "dynamic", scale_fmt, layer.bias is not None
    )
    exponents = torch.randint(-12, -9, new.weight_scale_inv.shape)
    new.weight_scale_inv.data = torch.exp2(exponents.float()).to(new.weight_scale_inv.dtype)
    new.weight.data = (layer.weight.data * 1000).clamp(-448, 448).to(torch.float8_e4m3fn)
    return new.requires_grad_(False)


@pytest.mark.parametrize(
    ("block", "scale_fmt"), [([48, 32], "float"), ([16, 64], "ue8m0"), (None, "float")], ids=str
)
def test_layers_and_head_in_float8_train_as_pefts(kernel, submodule, monkeypatch, block, scale_fmt) -> None:
    def multiply(x: Any, weight: Any, scales: Any, size: Any, bias: Any, *_: Any) -> torch.Tensor:
        dense = finegrained_fp8._dequantize_fp8_weight(weight, scales, size, x.dtype)
        return torch.nn.functional.linear(x, dense, bias)

    # The library's own product, a kernel of the Hub's for GPUs, rounds its input, too.
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", multiply)
    model = llama()
    for name in ("lm_head", *(f"model.layers.0.self_attn.{name}" for name in PROJECTIONS[:4])):
        model.set_submodule(name, float8(model.get_submodule(name), block, scale_fmt))
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=[*PROJECTIONS, "lm_head"], init_lora_weights=False)
    )
    expected = step(model)
    decoded: list[tuple[int, int]] = []
    module = submodule("integration.loss.quantized")
    decode = module.decode

    def watched(stack: Any, experts: Any) -> torch.Tensor:
        decoded.append(tuple(stack.shape[1:]))
        return decode(stack, experts)

    monkeypatch.setattr(module, "decode", watched)
    monkeypatch.setattr(submodule("ops.linear_cross_entropy.decoded"), "_PART_BYTES", 20 * 64 * 4)
    assert kernel.apply_to(model, "projections", "loss") == 9
    assert distance(step(model), expected) < 1e-5
    assert model(input_ids=IDS, labels=IDS).logits is None
    # Ten parts, in two forwards and a backward; and of each the whole blocks that its rows are in.
    assert len(decoded) == 30
    assert max(decoded) <= (20 + 2 * (block or [0])[0], 64) < (200, 64)


def test_layers_that_this_package_keeps_in_float8_train_as_pefts(kernel) -> None:
    model = llama().to(torch.bfloat16)
    kernel.train_in_float8(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False))
    weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert type(weight).__name__ == "Float8Weight"
    expected = step(model)
    assert kernel.apply_to(model, "projections") == 7
    assert distance(step(model), expected) < 0.02
