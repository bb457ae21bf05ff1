"""Losses of language models from their hidden states, against the same models without."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import types
from typing import Any

import pytest
import torch
import transformers
from gemma4_models import IDS, TEXT, build, distance, step
from peft import LoraConfig, get_peft_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def causal(name: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **settings})
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


def multimodal(name: str) -> Any:
    """A conditional-generation model of which the text alone runs."""
    if name == "Gemma4":
        config = transformers.Gemma4Config(
            text_config={**TEXT, "final_logit_softcapping": 3.0}, vision_config=None, audio_config=None
        )
        return transformers.Gemma4ForConditionalGeneration(config).train()
    if name == "Gemma3":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config = transformers.Gemma3Config(
            text_config={**SMALL, "head_dim": 16},
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        )
        return transformers.Gemma3ForConditionalGeneration(config).train()
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**SMALL, "rope_parameters": rope}, vision_config=vision
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).train()


MODELS = {
    "llama": lambda: causal("Llama"),
    "tied and capped": lambda: causal(
        "Gemma2", final_logit_softcapping=2.0, head_dim=8, tie_word_embeddings=True
    ),
    "scaled": lambda: causal("Cohere", logit_scale=0.3),
    "divided": lambda: causal("Granite", logits_scaling=4.0),
    "another head": lambda: causal(
        "BioGpt",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
    ),
    "contiguous": lambda: causal("OPT", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "capped by a function": lambda: causal("RecurrentGemma", lru_width=32, logits_soft_cap=2.0),
    "auxiliary loss": lambda: causal(
        "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, output_router_logits=True
    ),
    **{name: lambda name=name: multimodal(name) for name in ("Gemma4", "Gemma3", "Qwen2_5_VL")},
}


@pytest.fixture
def no_logits(kernel, submodule, monkeypatch) -> None:
    """Fails where logits are computed."""

    def value(self: Any) -> torch.Tensor:
        raise AssertionError("the logits were computed")

    monkeypatch.setattr(submodule("integration.loss.forward")._Logits, "value", value)


@pytest.mark.usefixtures("no_logits")
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_same_and_no_logits_are_made(kernel, name) -> None:
    model = MODELS[name]()
    labels = IDS.clone()
    labels[0, :5] = -100
    calls: list[dict[str, Any]] = [
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": torch.tensor(50)},
    ]
    calls.append({"labels": labels, "shift_labels": labels.roll(-1, dims=1), "num_items_in_batch": 9})
    for inputs in calls:
        plain = step(model, **inputs)
        assert kernel.apply_to(model, "loss") == kernel.apply_to(model, "loss") == 1
        fused = step(model, **inputs)
        assert distance(fused, plain) < 1e-5
        assert model(input_ids=IDS, labels=labels).logits is None
        assert kernel.remove_from(model) == 1
        assert not type(model).__name__.startswith("Fused")


@pytest.mark.usefixtures("no_logits")
@pytest.mark.parametrize("saved", [False, True])
def test_adapter_or_trained_copy_of_the_head(kernel, saved) -> None:
    settings = {"modules_to_save": ["lm_head"]} if saved else {"target_modules": ["q_proj", "lm_head"]}
    model = get_peft_model(
        causal("Llama"), LoraConfig(r=4, init_lora_weights=False, **{"target_modules": ["q_proj"]} | settings)
    )
    plain = step(model)
    assert kernel.apply_to(model, "loss") == 1
    assert distance(step(model), plain) < 1e-5
    assert any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)
    with model.disable_adapter():
        fused = model(input_ids=IDS, labels=IDS).loss
        kernel.remove_from(model)
        torch.testing.assert_close(fused, model(input_ids=IDS, labels=IDS).loss)


def test_logits_are_there_where_they_are_asked_for(kernel) -> None:
    model = MODELS["tied and capped"]()
    expected = model(input_ids=IDS).logits
    kernel.apply_to(model, "loss")
    assert torch.equal(model(input_ids=IDS).logits, expected)
    for training, asked, there in (
        (True, None, False),
        (True, False, True),
        (False, None, True),
        (False, True, False),
    ):
        model.train(training)
        output = model(input_ids=IDS, labels=IDS, skip_logits=asked)
        assert (output.logits is not None) == there
        if there:
            assert torch.equal(output.logits, expected)
        assert (
            len(model(input_ids=IDS, labels=IDS, skip_logits=asked, use_cache=False, return_dict=False))
            == 1 + there
        )


@pytest.mark.parametrize("training", [False, True])
def test_logits_that_are_returned_are_computed_once(kernel, training) -> None:
    model = get_peft_model(
        MODELS["tied and capped"](),
        LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False),
    ).train(training)
    labels = IDS.repeat(1, 20)
    labels[0, 3:9] = -100
    counted: list[int] = []
    model.base_model.model.lm_head.base_layer.register_forward_hook(lambda *_: counted.append(1))
    kernel.apply_to(model, "loss")
    for num_items in (None, torch.tensor(31)):
        with torch.set_grad_enabled(training):
            output = model(
                input_ids=IDS.repeat(1, 20), labels=labels, skip_logits=False, num_items_in_batch=num_items
            )
        assert len(counted) == 1
        counted.clear()
        expected = transformers.loss.loss_utils.ForCausalLMLoss(output.logits, labels, 64, num_items)
        torch.testing.assert_close(output.loss, expected)


def test_labels_of_another_shape_are_refused_by_name(kernel) -> None:
    model = causal("Llama")
    kernel.apply_to(model, "loss")
    message = r"loss: labels: expected one for each token that the head is given, \[2, 21\], got \[2, 20\]"
    for training in (True, False):
        with pytest.raises(ValueError, match=message), torch.no_grad():
            model.train(training)(input_ids=IDS, labels=IDS[:, 1:])
    with pytest.raises(ValueError, match=r"shift_labels: expected .* got \[2, 20\]"):
        model(input_ids=IDS, labels=IDS, shift_labels=IDS[:, 1:])


def test_it_can_be_undone_and_done_again_within_accelerates_wrapper(kernel, monkeypatch) -> None:
    from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel

    model = causal("Llama")
    kernel.apply_to(model, "loss")
    # As Accelerator.prepare does for mixed precision.
    model._original_forward = model.forward
    autocast = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = types.MethodType(convert_outputs_to_fp32(autocast), model)

    def is_fused() -> bool:
        output = model(input_ids=IDS, labels=IDS)
        assert output.loss.dtype == torch.float32
        return output.logits is None

    assert is_fused()
    assert kernel.apply_to(model, "loss") == 1
    assert kernel.remove_from(model) == 1
    assert not is_fused()
    assert kernel.remove_from(model) == 0
    assert kernel.apply_to(model, "loss") == 1
    assert is_fused()
    assert extract_model_from_parallel(model, keep_fp32_wrapper=False).forward == model.forward
    assert is_fused()
    # Another wrapper is not known to run the class's own.
    model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)
    with pytest.raises(NotImplementedError, match="something else replaced its forward after apply_to"):
        kernel.remove_from(model)
    del model.forward
    assert kernel.remove_from(model) == 1
    assert not is_fused()


def test_trainer_accumulates_to_the_same_losses(kernel, tmp_path) -> None:
    histories = []
    start = causal("Llama")
    rows = [{"input_ids": row, "labels": row.clone()} for row in IDS.repeat(4, 1)]
    for row in rows[::3]:
        row["labels"][:9] = -100
    for fused in (False, True):
        model = copy.deepcopy(start)
        if fused:
            kernel.apply_to(model, "loss")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=3,
        )
        arguments.logging_steps, arguments.save_strategy, arguments.report_to = 1, "no", []
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        histories.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(histories[0]) == 3
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)


def test_compiled_and_checkpointed_steps_are_the_same(kernel) -> None:
    model = build("dense")
    model.config.final_logit_softcapping = 3.0
    plain = step(model)
    kernel.apply_to(model, "loss")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert distance(step(model), plain) < 1e-5
    model.gradient_checkpointing_disable()
    compiled = torch.compile(model, backend="aot_eager")
    assert distance([compiled(input_ids=IDS, labels=IDS).loss.detach()], plain[:1]) < 1e-5


def test_copies_run_fused_and_pickles_hold_the_plain_model(kernel) -> None:
    model = build("dense")
    kernel.apply_to(model, "loss")
    assert copy.deepcopy(model)(input_ids=IDS, labels=IDS).logits is None
    assert type(pickle.loads(pickle.dumps(model))) is transformers.Gemma4ForCausalLM


@pytest.mark.parametrize("kind", ["hook", "dropout", "vocabulary"])
def test_head_that_is_more_than_a_linear_layer_runs_as_it_is_and_the_log_says_why(
    kernel, submodule, caplog, kind
) -> None:
    heads = submodule("integration.loss.heads")
    heads._logged.clear()
    caplog.set_level(logging.WARNING, heads.__name__)
    model = causal("Llama")
    if kind == "dropout":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5))
    elif kind == "hook":
        model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    else:
        model.resize_token_embeddings(70)
        model.config.vocab_size = 35
    labels = IDS % 35
    torch.manual_seed(1)
    plain = model(input_ids=IDS, labels=labels).loss if kind != "vocabulary" else None
    kernel.apply_to(model, "loss")
    torch.manual_seed(1)
    if kind == "vocabulary":
        with pytest.raises(ValueError, match="batch_size"):
            model(input_ids=IDS, labels=labels)
    else:
        assert torch.equal(model(input_ids=IDS, labels=labels).loss, plain)
    reason = {"hook": "the head has hooks", "dropout": "drops inputs", "vocabulary": "70 words, the loss 35"}[
        kind
    ]
    assert reason in caplog.text


def test_a_class_that_does_more_with_its_logits_is_refused_with_the_line(kernel) -> None:
    bamba = causal("Bamba", mamba_n_heads=4, mamba_d_head=16, mamba_expand=2, attn_layer_indices=[0])
    with pytest.raises(
        NotImplementedError, match=re.escape("something else with the logits: z_loss = logits.logsumexp")
    ):
        kernel.apply_to(bamba, "loss")
    with torch.device("meta"):
        outer = transformers.Blip2ForConditionalGeneration(
            transformers.Blip2Config(text_config={**SMALL, "model_type": "opt"})
        )
    with pytest.raises(NotImplementedError, match="its head is another module's, and it computes its loss"):
        kernel.apply_to(outer, "loss")
    assert kernel.apply_to(outer.language_model, "loss") == 1
    model = causal("Llama")
    model.loss_function = lambda **_: torch.zeros(())
    with pytest.raises(
        NotImplementedError, match="its loss is <lambda>, not ForCausalLMLoss; nothing was changed"
    ):
        kernel.apply_to(model, "loss")
    with pytest.raises(
        ValueError, match=r"expected a model with a linear head whose logits .* got a LlamaModel"
    ):
        kernel.apply_to(causal("Llama").model, "loss")


def test_others_see_the_class_that_it_was(kernel, tmp_path) -> None:
    plain = causal("Llama")
    model = get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))
    kernel.apply_to(model, "loss", "norm")
    # Trainer's label smoothing, AutoPeftModel and vLLM go by these names.
    assert plain._get_name() == "LlamaForCausalLM"
    assert type(plain).__module__ == "transformers.models.llama.modeling_llama"
    plain.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]
    # A wrapper that hands attributes on is copied as the wrapper that it is.
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    ids = torch.arange(2, 12).view(1, 10)
    assert torch.equal(twin(input_ids=ids, labels=ids).loss, model(input_ids=ids, labels=ids).loss)
    assert twin(input_ids=ids, labels=ids).logits is None


def test_it_is_undone_whatever_became_of_the_head_and_the_loss(kernel) -> None:
    for attribute, value in (("loss_function", lambda **_: torch.zeros(())), ("lm_head", None)):
        model = causal("Llama")
        kernel.apply_to(model, "loss")
        setattr(model, attribute, value)
        assert [kernel.remove_from(model), kernel.remove_from(model)] == [1, 0]


def test_norms_with_a_gate_run_as_they_are(kernel) -> None:
    model = causal("Mamba2", num_heads=4, head_dim=16, state_size=16, n_groups=1, chunk_size=8)
    ids = torch.arange(2, 12).view(1, 10)
    expected = model(input_ids=ids).logits
    kernel.apply_to(model, "norm")
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)


def test_it_runs_beside_the_other_parts_and_is_asked_for_by_name(kernel) -> None:
    model = build("dense")
    plain = step(model)
    layers = model.config.num_hidden_layers
    assert kernel.apply_to(model) == layers
    assert model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits is not None
    parts = kernel.apply_to(model, "attention", "mlp", "norm", "loss")
    assert distance(step(model), plain) < 1e-5
    assert kernel.remove_from(model) == parts > layers + 1
