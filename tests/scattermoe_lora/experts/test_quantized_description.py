"""A model's config and quantizer say whether its experts are quantized, and one build at a time reads that."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from quantized_models import adapted, build, logits, qwen3
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING


def test_merged_experts_are_described_as_dense(registered: ModuleType, tmp_path: Path) -> None:
    def merged() -> Any:
        base = build(qwen3())
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


def test_two_formats_in_one_checkpoint_are_refused(registered: ModuleType, submodule, tmp_path: Path) -> None:
    model = build(qwen3())
    registered.quantize_experts(model, "nf4")
    experts = model.model.layers[1].mlp.experts
    stack = submodule("ops.quantization.encode").quantize(experts.down_proj.dequantize(), "fp8")
    weight = submodule("integration.experts.quantized.parameter").QuantizedWeight(stack)
    experts.down_proj = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: expected the format .* nf4"):
        model.save_pretrained(tmp_path)


def test_models_of_one_config_are_described_apart(registered: ModuleType) -> None:
    settings = qwen3()
    quantized, dense = build(settings), build(settings)
    dense.config = quantized.config
    registered.quantize_experts(quantized)
    assert not hasattr(dense.config, "quantization_config")
    configs = [module.config for module in quantized.modules() if hasattr(module, "config")]
    assert len(configs) > 4
    assert all(module_config is quantized.config for module_config in configs)
    quantized.set_experts_implementation("eager")
    assert quantized.model.layers[0].mlp.experts.config._experts_implementation == "eager"


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
