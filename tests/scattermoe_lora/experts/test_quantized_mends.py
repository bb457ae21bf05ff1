"""Quantized experts where adapters are merged, checkpoints lack experts, and models, configs and builds are several."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_close
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.debugging import aot_eager
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

IDS = torch.arange(12).view(2, 6)
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
DORA = {"use_dora": True, "lora_dropout": 0.1}


@pytest.fixture(autouse=True)
def never_decoded_silently() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decodes all of it")
        yield


def config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=64,
    )


def model_of(settings: Qwen3MoeConfig, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_config(settings, dtype=dtype, experts_implementation="scattermoe").eval()


def adapted(model: Any, **settings: Any) -> Any:
    lora = LoraConfig(r=3, target_parameters=TARGETS, init_lora_weights=False, **settings)
    return get_peft_model(model, lora).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_dora_over_quantized_experts_compiles_and_merges(registered: ModuleType) -> None:
    base = model_of(config())
    registered.quantize_experts(base, "fp8")
    model = adapted(base, **DORA)
    exact = logits(model)
    torch._dynamo.reset()
    assert_close([logits(torch.compile(model, fullgraph=True, backend=aot_eager))], [exact], 1e-5)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="merging LoRA into quantized experts makes them dense"):
        merged = model.merge_and_unload()
    assert_close([logits(merged)], [exact], 1e-5)


def test_merged_experts_are_described_as_dense(registered: ModuleType, tmp_path: Path) -> None:
    def merged() -> Any:
        base = model_of(config())
        registered.quantize_experts(base, "nf4")
        with pytest.warns(UserWarning, match="makes them dense"):
            return adapted(base).merge_and_unload()

    model = merged()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="scattermoe")
    assert torch.equal(logits(again), logits(model))

    model = merged()
    registered.dequantize_experts(model)
    assert not model.is_quantized
    with pytest.raises(ValueError, match="expected quantized experts"):
        registered.dequantize_experts(model)

    model = merged()
    registered.quantize_experts(model, "fp8")
    assert model.config.quantization_config.linears is None
    assert type(model.hf_quantizer.linears) is not type(model.hf_quantizer)
    registered.dequantize_experts(model)
    assert not hasattr(model.config, "quantization_config")


def test_merged_adapters_are_refused(registered: ModuleType) -> None:
    model = adapted(model_of(config()))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"mlp\.experts.*: default; unmerge first, or merge_and_unload"):
        registered.quantize_experts(model)
    model.unmerge_adapter()
    registered.quantize_experts(model)


def without(name: str) -> Any:
    return lambda tensors: [
        tensors.pop(key) for key in list(tensors) if f"layers.1.mlp.experts.{name}" in key
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("3"), r"layers\.1\.mlp\.experts\.\w+: expected weights of \[4, .* got \[3, "),
        (
            without("3.up_proj"),
            r"experts\.gate_up_proj: expected as many experts .* got 4 of .*, 3 of .*up_proj",
        ),
    ],
    ids=["an expert", "a projection"],
)
def test_a_checkpoint_that_lacks_experts_is_refused(
    registered: ModuleType, tmp_path: Path, damage: Any, message: str
) -> None:
    model_of(config(), torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, quantization_config=registered.quantization_config("nf4")
        )


def test_two_formats_in_one_checkpoint_are_refused(registered: ModuleType, submodule, tmp_path: Path) -> None:
    model = model_of(config())
    registered.quantize_experts(model, "nf4")
    experts = model.model.layers[1].mlp.experts
    stack = submodule("ops.quantization.encode").quantize(experts.down_proj.dequantize(), "fp8")
    weight = submodule("integration.experts.quantized.parameter").QuantizedWeight(stack)
    experts.down_proj = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: expected the format .* nf4"):
        model.save_pretrained(tmp_path)


def test_models_of_one_config_are_described_apart(registered: ModuleType) -> None:
    settings = config()
    quantized, dense = model_of(settings), model_of(settings)
    dense.config = quantized.config
    registered.quantize_experts(quantized)
    assert not hasattr(dense.config, "quantization_config")
    configs = [module.config for module in quantized.modules() if hasattr(module, "config")]
    assert len(configs) > 4
    assert all(module_config is quantized.config for module_config in configs)
    quantized.set_experts_implementation("eager")
    assert quantized.model.layers[0].mlp.experts.config._experts_implementation == "eager"


def test_lists_of_weights_are_not_written_to(registered: ModuleType) -> None:
    model = model_of(config())
    registered.quantize_experts(model)
    weight = model.model.layers[0].mlp.experts.down_proj
    with pytest.raises(RuntimeError, match=r"_foreach_mul_.* cannot be written to"):
        torch._foreach_mul_([torch.ones(2), weight.data], 2.0)


def test_builds_leave_in_any_order(kernel: ModuleType, submodule) -> None:
    loading = submodule("integration.experts.quantized.loading")
    mappings = AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    class Config:
        replaced: Any = None

    class Above(Config):
        pass

    def standing() -> list[Any]:
        return [mapping.get("scattermoe") for mapping in mappings]

    def put(entry: Any) -> None:
        for mapping in mappings:
            mapping["scattermoe"] = entry

    assert standing() == [None, None]
    try:
        put(Config)
        kernel.register()
        kernel.register()
        ours = standing()
        assert Config not in ours
        kernel.unregister()
        assert standing() == [Config, Config]

        kernel.register()
        Above.replaced = ours
        put(Above)
        kernel.unregister()
        assert standing() == [Above, Above]
        assert Above.replaced == [Config, Config]

        loading.register_quantizer()
        for mapping in mappings:
            del mapping["scattermoe"]
        with pytest.raises(RuntimeError, match=r"expected register\(\) to be called first"):
            kernel.quantization_config()
    finally:
        kernel.unregister()
        loading.unregister_quantizer()
        for mapping in mappings:
            mapping.pop("scattermoe", None)


def test_modules_to_skip_are_a_list(registered: ModuleType) -> None:
    with pytest.raises(ValueError, match="skip_modules: expected a list of names, got the string 'lm_head'"):
        registered.quantization_config(skip_modules="lm_head")
