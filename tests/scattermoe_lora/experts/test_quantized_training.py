"""PEFT's LoRA over quantized experts: trained, compiled, saved and merged as over the dense weights they decode to."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gemma4_models
import pytest
import torch
from helpers import assert_close
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig, GptOssConfig

IDS = torch.arange(2 * 13).view(2, 13) * 7 % 61 + 2
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def gemma4() -> Any:
    settings = {**gemma4_models.TEXT, **gemma4_models.KINDS["moe"], "num_hidden_layers": 2}
    config = Gemma4TextConfig(**settings | {"layer_types": ["sliding_attention", "full_attention"]})
    return Gemma4ForCausalLM(config).train()


def gpt_oss() -> Any:
    """Transposed weights with biases, and a clamped gate."""
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def lora(**settings: Any) -> LoraConfig:
    settings = {"r": 3, "lora_alpha": 6, "target_parameters": TARGETS, "init_lora_weights": False} | settings
    return LoraConfig(**settings)


def adapted(model: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, lora(**settings))


def quantized(kernel: ModuleType, build: Any, format: str) -> Any:
    model = build()
    model.set_experts_implementation("scattermoe")
    kernel.quantize_experts(model, format)
    return model


def decoded(kernel: ModuleType, model: Any) -> Any:
    """A dense copy of a quantized model, of transformers' eager experts."""
    model = copy.deepcopy(model)
    kernel.dequantize_experts(model)
    model.set_experts_implementation("eager")
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def step(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture(autouse=True)
def never_decoded_silently() -> Iterator[None]:
    """A dense copy of a stack that only a warning would tell of fails the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decodes all of it")
        yield


@pytest.mark.parametrize(("build", "format"), [(gemma4, "nf4"), (gpt_oss, "fp8"), (gpt_oss, "fp4")])
def test_training_descends_as_over_the_dense_weights(registered: ModuleType, build: Any, format: str) -> None:
    base = quantized(registered, build, format)
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


@pytest.mark.parametrize("build", [gemma4, gpt_oss])
def test_checkpointed_copied_reloaded_and_compiled_models_agree(registered: ModuleType, build: Any) -> None:
    model = adapted(quantized(registered, build, "nf4"))
    exact = step(model)
    assert len(exact) == 1 + sum("lora_" in name for name, _ in model.named_parameters())

    other = adapted(quantized(registered, build, "nf4"))
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


@pytest.mark.parametrize("build", [gemma4, gpt_oss])
def test_merging_decodes_and_says_so(registered: ModuleType, build: Any) -> None:
    base = quantized(registered, build, "fp8")
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


def test_without_the_hook_a_merge_fails_and_loses_nothing(kernel: ModuleType) -> None:
    model = gemma4()
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


def test_experts_that_bitsandbytes_parametrized_are_never_evaluated(
    registered: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    models = []
    # Not copied, for copies share the class that torch made, and with it what is parametrized.
    for _ in range(2):
        torch.manual_seed(0)
        models.append(gemma4())
        targets = []
        for path, module in models[-1].named_modules():
            if hasattr(module, "has_gate"):
                for name in ("gate_up_proj", "down_proj"):
                    parametrize.replace_parameter_4bit(module, name, compress_statistics=True)
                    targets.append(f"{path}.{name}")
    registered.dequantize_experts(models[1])
    models[0].set_experts_implementation("scattermoe")
    model, dense = (adapted(each, target_parameters=targets) for each in models)
    # PEFT nests the wrappers around parametrized weights in another order.
    wrappers, others = (
        {
            (path.partition(".experts")[0], m.parameter_name): m
            for path, m in each.named_modules()
            if hasattr(m, "parameter_name")
        }
        for each in (model, dense)
    )
    for key, wrapper in wrappers.items():
        for factor in ("lora_A", "lora_B"):
            getattr(others[key], factor).load_state_dict(getattr(wrapper, factor).state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(parametrize.Bnb4bitParametrization, "forward", lambda *_: 1 / 0)
        loss = step(model)[0]
    assert_close([loss], [step(dense)[0]], 1e-5)
    for key, wrapper in wrappers.items():
        got, exact = (w.lora_A["default"].weight.grad for w in (wrapper, others[key]))
        assert_close([got], [exact], 2e-4)
    active = logits(model)
    with pytest.warns(UserWarning, match="makes them dense"):
        model.merge_adapter()
    assert_close([logits(model)], [active], 2e-5)
