"""Experts quantized while transformers loads them, and checkpoints of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from allocations import Allocations
from quantized_models import (
    IDS,
    adapted,
    assert_same_bits,
    build,
    gemma4,
    gpt_oss,
    load,
    logits,
    qwen3,
    save_dense,
    stacks,
)
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

CODES, SCALES = ("model.layers.1.mlp.experts.down_proj" + part for part in ("_codes", "_scales"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[Any], tuple[Any, Path]]:
    """``checkpoint(config)``: a dense model in bfloat16, and a folder where it is saved."""
    return lambda config: save_dense(config, tmp_path)


# A tensor for each expert in the checkpoint; one for all of them, transposed; and blocks that cross from one expert to
# the next.
CONFIGS = {
    "by expert": qwen3(),
    "fused": gpt_oss(),
    "crossing": qwen3(hidden_size=30, moe_intermediate_size=6),
}


@pytest.mark.parametrize(
    ("kind", "quant_type"),
    [("by expert", "nf4"), ("by expert", "fp8"), ("fused", "fp4"), ("fused", "fp8"), ("crossing", "nf4")],
)
def test_loading_quantizes_and_saving_keeps_the_bits(
    registered: ModuleType, submodule, checkpoint, tmp_path: Path, kind: str, quant_type: str
) -> None:
    dense, folder = checkpoint(CONFIGS[kind])
    quantize = submodule("ops.quantization.encode").quantize
    expected = {
        name: quantize(parameter, quant_type)
        for name, parameter in dense.named_parameters()
        if name.endswith(("gate_up_proj", "down_proj"))
    }
    assert len(expected) == 4

    model = load(folder, quantization_config=registered.quantization_config(quant_type))
    assert_same_bits(stacks(model), expected)
    assert all(
        torch.equal(p, dense.get_parameter(n)) for n, p in model.named_parameters() if n not in expected
    )
    for again in ("once", "twice"):
        model.save_pretrained(tmp_path / again)
        model = load(tmp_path / again)
        assert_same_bits(stacks(model), expected)
    assert model.is_quantized
    assert model.hf_quantizer.is_trainable


@pytest.mark.parametrize("config", [gemma4, gpt_oss])
def test_trainer_trains_lora_over_a_quantized_checkpoint(
    registered: ModuleType, checkpoint, tmp_path: Path, config: Callable[[], Any]
) -> None:
    _, folder = checkpoint(config())
    load(folder, quantization_config=registered.quantization_config("nf4")).save_pretrained(
        tmp_path / "quantized"
    )
    model = load(tmp_path / "quantized", experts_implementation="scattermoe")
    before = {name: stack.codes.clone() for name, stack in stacks(model).items()}
    model = adapted(model, r=4, init_lora_weights=True)
    samples = [{"input_ids": (IDS * 5 + i) % 61 + 2, "labels": (IDS * 5 + i) % 61 + 2} for i in range(4)]
    samples = [{key: ids[0] for key, ids in sample.items()} for sample in samples]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        num_train_epochs=4,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        logging_steps=1,
        gradient_checkpointing=True,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=samples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < 0.97 * sum(losses[:2])
    assert all(
        torch.equal(stack.codes, before[name.removeprefix("base_model.model.").replace(".base_layer", "")])
        for name, stack in stacks(model).items()
    )
    assert len(stacks(model)) == len(before) == 4


@pytest.mark.parametrize("how", ["quantize_experts", "from_pretrained"])
def test_a_model_made_dense_again_is_saved_as_a_dense_one(
    registered: ModuleType, checkpoint, tmp_path: Path, how: str
) -> None:
    _, folder = checkpoint(qwen3())
    quantization = registered.quantization_config("nf4")
    model = load(folder, **({} if how == "quantize_experts" else {"quantization_config": quantization}))
    if how == "quantize_experts":
        registered.quantize_experts(model, "nf4")
    model.save_pretrained(tmp_path / "quantized")
    model = load(tmp_path / "quantized")
    expected = {name: model.get_parameter(name).dequantize() for name in stacks(model)}
    assert len(expected) == 4
    if how == "quantize_experts":
        registered.dequantize_experts(model)
    else:
        model = model.dequantize()
    model.save_pretrained(tmp_path / "dense again")
    assert not hasattr(model.config, "quantization_config")
    # By expert, as other programs read it.
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in load_file(
        tmp_path / "dense again/model.safetensors"
    )
    again = load(tmp_path / "dense again")
    assert not stacks(again)
    assert all(torch.equal(again.get_parameter(name), dense) for name, dense in expected.items())


@pytest.mark.parametrize("kind", ["by expert", "fused"])
def test_the_dense_model_never_exists(registered: ModuleType, checkpoint, kind: str) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 64}
    config = qwen3(16, **sizes, moe_intermediate_size=64) if kind == "by expert" else gpt_oss(16, **sizes)
    _, folder = checkpoint(config)
    with Allocations() as allocations:
        model = load(folder, quantization_config=registered.quantization_config("nf4"))
    kept = allocations.now()
    stack = next(iter(stacks(model).values()))
    # Float32 of what is encoded at a time, and what becomes of it. A checkpoint's one tensor of all experts is dense.
    expert_bytes = 4 * stack.shape[1] * stack.shape[2]
    encoded = 16 if kind == "fused" else 1
    assert allocations.peak - kept < 6 * encoded * expert_bytes + stack.nbytes


def test_layers_are_offloaded_to_the_cpu_and_not_to_disk(
    registered: ModuleType, checkpoint, tmp_path: Path
) -> None:
    _, folder = checkpoint(qwen3())
    quantization = registered.quantization_config("nf4")
    model = load(folder, quantization_config=quantization, experts_implementation="scattermoe")
    model.save_pretrained(tmp_path / "quantized")
    exact, bits = logits(model), stacks(model)
    accelerate.cpu_offload(model, "cpu")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(logits(model), exact)
    model.hf_device_map = {"": "cpu"}  # As transformers notes it.
    model.save_pretrained(tmp_path / "offloaded")
    remove_hook_from_submodules(model)
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in model.parameters())
    assert_same_bits(stacks(model), bits)
    assert_same_bits(stacks(load(tmp_path / "offloaded")), bits)

    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"], "cpu")
    for path, arguments in ((folder, {"quantization_config": quantization}), (tmp_path / "quantized", {})):
        with pytest.raises(
            ValueError, match=r"model\.layers\.1: expected a device or the CPU for .*, got disk"
        ):
            load(path, device_map={**places, "model.layers.1": "disk", "lm_head": "cpu"}, **arguments)


def test_modules_to_skip_stay_dense(registered: ModuleType, checkpoint) -> None:
    _, folder = checkpoint(qwen3())
    config = registered.quantization_config("nf4", skip_modules=["layers.0.mlp.experts"])
    model = load(folder, quantization_config=config)
    assert list(stacks(model)) == [f"model.layers.1.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")]
    model.save_pretrained(folder / "quantized")
    assert_same_bits(stacks(load(folder / "quantized")), stacks(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(SCALES), r"expected codes and scales in the checkpoint"),
        (lambda tensors: tensors[SCALES].fill_(float("nan")), r"expected finite scales, got 96"),
        (
            lambda tensors: tensors.update({SCALES: tensors[SCALES][:-1].clone()}),
            r"of shape \[96\], got \[95\]",
        ),
        (
            lambda tensors: tensors.update(
                {CODES: tensors[CODES][:, :16].clone(), SCALES: tensors[SCALES][:48].clone()}
            ),
            r"expected codes of \[4, 32, 48\], got \[4, 16, 48\]",
        ),
    ],
    ids=["missing scales", "NaN", "another number of scales", "another shape"],
)
def test_a_damaged_checkpoint_is_refused(
    registered: ModuleType, checkpoint, change, message, monkeypatch, caplog
) -> None:
    _, folder = checkpoint(qwen3())
    load(folder, quantization_config=registered.quantization_config("nf4")).save_pretrained(
        folder / "quantized"
    )
    file = folder / "quantized" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError, match="automatic conversion"):
        load(folder / "quantized")
    assert re.search(message, caplog.text)


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
    build(qwen3(), torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load(tmp_path, quantization_config=registered.quantization_config("nf4"))


def test_bad_arguments(kernel: ModuleType, registered: ModuleType) -> None:
    with pytest.raises(ValueError, match="quant_type: expected one of nf4, fp4, fp8, got 'int3'"):
        registered.quantization_config("int3")
    with pytest.raises(ValueError, match="skip_modules: expected a list of names, got the string 'lm_head'"):
        registered.quantization_config(skip_modules="lm_head")
    kernel.unregister()
    with pytest.raises(RuntimeError, match=r"expected register\(\) to be called first"):
        kernel.quantization_config()
