"""Dense layers that torchao quantized, with PEFT's adapters on them, run fused: projections, and the head."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from gemma4_models import IDS, distance, step
from peft import LoraConfig, get_peft_model
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerBlock,
    PerGroup,
    PerTensor,
    quantize_,
)
from transformers import LlamaConfig, LlamaForCausalLM

# All of it runs fused.
pytestmark = pytest.mark.filterwarnings("error:scattermoe. a projection runs through")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, Any] = {
    "int8": Int8WeightOnlyConfig(),
    "int8, groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "float8, rows": Float8WeightOnlyConfig(),
    "float8, tensor": lambda weight: Float8Tensor.from_hp(weight, granularity=PerTensor()),
    "float8, blocks": lambda weight: Float8Tensor.from_hp(weight, granularity=PerBlock([32, 32])),
    "nvfp4": lambda weight: NVFP4Tensor.to_nvfp4(weight),
}


def quantized(kind: Any, dtype: torch.dtype) -> Any:
    sizes = {"vocab_size": 192, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, initializer_range=0.2)).to(dtype)
    for name, layer in model.named_modules():
        if not name.endswith((*PROJECTIONS, "lm_head")):
            continue
        if callable(kind):
            layer.weight = torch.nn.Parameter(kind(layer.weight.detach()), requires_grad=False)
        else:
            quantize_(layer, kind)
    return model.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
def test_layers_and_head_train_as_pefts_and_no_logits_are_made(
    kernel, submodule, monkeypatch, kind, dtype
) -> None:
    model = quantized(KINDS[kind], dtype)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=[*PROJECTIONS, "lm_head"], init_lora_weights=False)
    )
    expected = step(model)
    # A part ends within a block.
    monkeypatch.setattr(submodule("ops.linear_cross_entropy.decoded"), "_PART_BYTES", 20 * 64 * 4)
    assert kernel.apply_to(model, "projections", "loss") == 9
    assert distance(step(model), expected) < (1e-5 if dtype == torch.float32 else 0.02)
    assert model(input_ids=IDS, labels=IDS).logits is None


def test_a_head_that_rounds_its_input_runs_as_it_is_and_the_log_says_why(kernel, submodule, caplog) -> None:
    heads = submodule("integration.loss.heads")
    heads._logged.clear()
    caplog.set_level(logging.WARNING, heads.__name__)
    model = quantized(Int8DynamicActivationInt8WeightConfig(), torch.float32)
    expected = model(input_ids=IDS, labels=IDS)
    kernel.apply_to(model, "loss")
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss, expected.loss)
    assert "the head's weight is a Int8Tensor that changes the input, too (act_quant_kwargs)" in caplog.text
