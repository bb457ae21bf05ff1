"""PEFT's LoRA over quantized experts: trained, compiled, saved and merged as over the dense weights they decode to."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_close
from peft import PeftModel, get_peft_model
from quantized_models import adapted, build, gemma4, gpt_oss, logits, lora, qwen3, step


def quantized(kernel: ModuleType, config: Any, format: str) -> Any:
    model = build(config())
    kernel.quantize_experts(model, format)
    return model


def decoded(kernel: ModuleType, model: Any) -> Any:
    """A dense copy of a quantized model, of transformers' eager experts."""
    model = copy.deepcopy(model)
    kernel.dequantize_experts(model)
    model.set_experts_implementation("eager")
    return model


@pytest.fixture(autouse=True)
def never_decoded_silently() -> Iterator[None]:
    """A dense copy of a stack that only a warning would tell of fails the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decodes all of it")
        yield


@pytest.mark.parametrize(("config", "format"), [(gemma4, "nf4"), (gpt_oss, "fp8"), (gpt_oss, "fp4")])
def test_training_descends_as_over_the_dense_weights(
    registered: ModuleType, config: Any, format: str
) -> None:
    base = quantized(registered, config, format)
    dense = adapted(decoded(registered, base), init_lora_weights=True)
    losses = []
    for model in (adapted(base, init_lora_weights=True), dense):
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-2)
        losses.append([])
        for _ in range(5):
            losses[-1].append(step(model)[0])
            optimizer.step()
    assert float(losses[0][-1]) < 0.97 * float(losses[0][0])
    assert_close(losses[0], losses[1], 1e-4)


@pytest.mark.parametrize("config", [gemma4, gpt_oss])
def test_checkpointed_copied_reloaded_and_compiled_models_agree(registered: ModuleType, config: Any) -> None:
    model = adapted(quantized(registered, config, "nf4"))
    exact = step(model)
    assert len(exact) == 1 + sum("lora_" in name for name, _ in model.named_parameters())

    other = adapted(quantized(registered, config, "nf4"))
    assert not torch.equal(step(other)[0], exact[0])
    other.load_state_dict(model.state_dict())
    for same in (copy.deepcopy(model), other):
        assert all(torch.equal(a, b) for a, b in zip(step(same), exact, strict=True))

    for reentrant in (False, True):
        checkpointed = copy.deepcopy(model)
        base = checkpointed.base_model.model
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        base.enable_input_require_grads()
        assert all(torch.equal(a, b) for a, b in zip(step(checkpointed), exact, strict=True))

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(step(compiled), exact, 1e-5)


def test_adapters_are_added_switched_saved_and_loaded(registered: ModuleType, tmp_path: Path) -> None:
    base = quantized(registered, gemma4, "nf4")
    plain, dense = logits(base), adapted(decoded(registered, base))
    fresh = copy.deepcopy(base)
    model = adapted(base)
    for each in (model, dense):
        torch.manual_seed(2)
        each.add_adapter("second", lora(r=5))
    results = {}
    for active in ("default", "second", ["default", "second"]):
        for each in (model, dense):
            each.base_model.set_adapter(active)
        results[str(active)] = logits(model)
        assert_close([logits(model)], [logits(dense)], 2e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(loaded), results["default"])
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), results["second"])


@pytest.mark.parametrize("config", [gemma4, gpt_oss])
def test_merging_decodes_and_says_so(registered: ModuleType, config: Any) -> None:
    base = quantized(registered, config, "fp8")
    plain = logits(base)
    model = adapted(base)
    active, copied = logits(model), copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match="merging LoRA into quantized experts makes them dense, in torch.float32"
    ):
        model.merge_adapter()
    assert_close([logits(model)], [active], 2e-5)
    model.unmerge_adapter()
    assert_close([logits(model)], [active], 2e-5)
    with model.disable_adapter():
        assert_close([logits(model)], [plain], 2e-5)
    with pytest.warns(UserWarning, match="makes them dense"):
        merged = copied.merge_and_unload(safe_merge=True)
    assert_close([logits(merged)], [active], 2e-5)
    assert {type(p) for p in merged.parameters()} == {torch.nn.Parameter}


def test_dora_over_quantized_experts_compiles_and_merges(registered: ModuleType) -> None:
    model = adapted(quantized(registered, qwen3, "fp8"), use_dora=True, lora_dropout=0.1).eval()
    exact = logits(model)
    torch._dynamo.reset()
    assert_close([logits(torch.compile(model, fullgraph=True, backend="aot_eager"))], [exact], 1e-5)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="merging LoRA into quantized experts makes them dense"):
        merged = model.merge_and_unload()
    assert_close([logits(merged)], [exact], 1e-5)


def test_merged_adapters_are_refused(registered: ModuleType) -> None:
    model = adapted(build(qwen3()))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"mlp\.experts.*: default; unmerge first, or merge_and_unload"):
        registered.quantize_experts(model)
    model.unmerge_adapter()
    registered.quantize_experts(model)


def test_without_the_hook_a_merge_fails_and_loses_nothing(kernel: ModuleType) -> None:
    model = build(gemma4(), experts="eager")
    kernel.quantize_experts(model)
    with pytest.raises(RuntimeError, match=r"cannot be written to; call dequantize_experts\(model\) first"):
        adapted(model).merge_adapter()


def test_eager_experts_decode_one_matrix_at_a_time(registered: ModuleType) -> None:
    base = quantized(registered, gpt_oss, "nf4")
    dense = decoded(registered, base)
    base.set_experts_implementation("eager")
    assert torch.equal(logits(base), logits(dense))


def test_adapters_are_made_without_numbers(registered: ModuleType) -> None:
    model = quantized(registered, gemma4, "nf4").to("meta")
    for low_cpu_mem_usage in (False, True):
        wrapped = get_peft_model(copy.deepcopy(model), lora(), low_cpu_mem_usage=low_cpu_mem_usage)
        factors = [p for name, p in wrapped.named_parameters() if "lora_" in name]
        assert {(p.device.type, p.dtype) for p in factors} == {("meta", torch.float32)}
        assert factors[0].shape == (3 * 4, 32)
