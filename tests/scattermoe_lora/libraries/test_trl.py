"""TRL's trainers on a model whose loss is fused: the same training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from allocations import Allocations
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

WORDS = [f"w{index}" for index in range(61)]
VOCABULARY = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def build() -> Any:
    """A model with tied, capped head."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return transformers.Gemma2ForCausalLM(config)


def policy(tmp_path: Any, peft: bool, **options: Any) -> Any:
    """A trainer of log-probabilities at a temperature, with entropies and a reference model."""
    settings = GRPOConfig(
        str(tmp_path),
        **SETTINGS,
        num_generations=4,
        num_iterations=2,
        max_completion_length=6,
        temperature=0.7,
        beta=0.1,
        top_entropy_quantile=0.5,
        **options,
    )
    data = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{2 * i}"[: 6 + 3 * (i % 2)] for i in range(4)]})

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [
            sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) / 99 for text in completions
        ]

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if peft else None
    build().save_pretrained(tmp_path)  # the trainer loads the reference model by name
    model = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path)
    transformers.set_seed(0)
    return GRPOTrainer(model, reward, settings, data, processing_class=tokenizer(), peft_config=adapter)


def preferences(tmp_path: Any, **options: Any) -> Any:
    rows = {
        "prompt": ["w1 w2", "w3"] * 2,
        "chosen": [" w4 w5 w6", " w7"] * 2,
        "rejected": [" w8", " w9 w1"] * 2,
    }
    model, reference = build(), build()
    transformers.set_seed(0)
    settings = DPOConfig(str(tmp_path), **SETTINGS, **options)
    return DPOTrainer(
        model, reference, args=settings, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer()
    )


def judgements(tmp_path: Any) -> Any:
    rows = {
        "prompt": ["w1 w2", "w3"] * 2,
        "completion": [" w4 w5 w6", " w7 w8", " w9", " w5 w1"],
        "label": [True, False, False, True],
    }
    model, reference = build(), build()
    transformers.set_seed(0)
    settings = KTOConfig(str(tmp_path), **SETTINGS)
    return KTOTrainer(
        model, reference, args=settings, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer()
    )


def texts(tmp_path: Any) -> Any:
    rows = {"text": [" ".join(f"w{(i * j) % 61}" for j in range(1, 5 + 2 * i)) for i in range(1, 13)]}
    model = build()
    transformers.set_seed(0)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    settings = SFTConfig(str(tmp_path), **SETTINGS, packing=True, max_length=16)
    return SFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=adapter,
    )


def trained(trainer: Any) -> tuple[list[float], list[torch.Tensor]]:
    """What was logged of its steps, and the parameters that they made."""
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "kl", "logps/chosen", "rewards/margins")
    names += ("mean_token_accuracy", "logits/chosen", "logits/rejected", "eval_loss")
    logged = [step[name] for step in trainer.state.log_history for name in names if name in step]
    assert len(logged) >= 9
    return logged, [p.detach() for p in trainer.model.parameters() if p.requires_grad]


@pytest.fixture
def calls(submodule, monkeypatch) -> list[bool]:
    """Of each call of the loss for TRL, whether it asked for entropies."""
    module, calls = submodule("integration.loss.trl_head"), []
    plain = module.token_statistics

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[3].entropies)
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, "token_statistics", watched)
    return calls


@pytest.mark.parametrize("peft", [False, True])
def test_grpo_trains_to_the_same_weights(kernel, calls, tmp_path, peft) -> None:
    plain = trained(policy(tmp_path, peft))
    trainer = policy(tmp_path, peft)
    assert kernel.apply_to(trainer.model, "loss") == kernel.apply_to(trainer.model, "loss") == 1
    fused = trained(trainer)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    assert len(calls) >= 3
    assert all(calls)
    # The reference model is this one without its adapter, or another.
    assert (trainer.ref_model is None) == peft


def test_log_probs_and_entropies_are_those_of_the_logits(kernel, calls, tmp_path) -> None:
    trainer = policy(tmp_path, True)
    ids, mask, kept = torch.randint(3, 64, (8, 400)), torch.ones(8, 400, dtype=torch.long), 300
    mask[:4, :90] = 0
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -kept - 1 : -1].double() / 0.7
    log_probs = logits.log_softmax(-1)
    expected = log_probs.gather(-1, ids[:, -kept:, None])[..., 0], -(log_probs.exp() * log_probs).sum(-1)

    def get() -> tuple[Any, int]:
        with Allocations() as watched:
            *values, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, kept, compute_entropy=True
            )
            (values[0] + values[1]).sum().backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]
        trainer.model.zero_grad()
        return (values, gradients), watched.largest

    (plain, plain_gradients), plain_bytes = get()
    kernel.apply_to(trainer.model, "loss")
    (fused, gradients), largest = get()
    assert calls == [True]
    for value, other, exact in zip(fused, plain, expected, strict=True):
        torch.testing.assert_close(value, exact.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-4, atol=1e-4)
    assert largest * 20 < plain_bytes  # attention scores against tiles of TRL's
    generated = trainer.model.generate(input_ids=ids[:1, :5], max_new_tokens=3, do_sample=False)
    assert kernel.remove_from(trainer.model) == 1
    again, _ = get()
    torch.testing.assert_close(again, (plain, plain_gradients), rtol=0, atol=0)
    assert torch.equal(
        generated, trainer.model.generate(input_ids=ids[:1, :5], max_new_tokens=3, do_sample=False)
    )


@pytest.mark.parametrize("make", [preferences, judgements, texts], ids=["DPO", "KTO", "SFT"])
def test_trainers_with_metrics_of_the_logits_train_and_log_the_same(kernel, calls, tmp_path, make) -> None:
    plain = trained(make(tmp_path))
    trainer = make(tmp_path)
    models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]
    for model in models:
        assert kernel.apply_to(model, "loss") == 1
    torch.testing.assert_close(trained(trainer), plain, rtol=1e-5, atol=1e-5)
    # Their reference models are asked for log-probabilities alone.
    assert calls.count(True) >= 3
    assert (calls.count(False) > 0) == (len(models) == 2)


def test_a_metric_that_is_not_computed_here_is_refused_by_name(kernel, tmp_path) -> None:
    trainer = preferences(tmp_path, use_weighting=True)
    with pytest.raises(NotImplementedError, match="makes no logits either, returns log_sum_sq_probs, too"):
        kernel.apply_to(trainer.model, "loss")


def test_head_that_trl_casts_runs_as_trl_has_it_and_the_log_says_why(
    kernel, submodule, calls, tmp_path, caplog
) -> None:
    heads = submodule("integration.loss.heads")
    heads._logged.clear()
    plain = trained(policy(tmp_path, False, cast_lm_head_to_fp32=True))
    trainer = policy(tmp_path, False, cast_lm_head_to_fp32=True)
    kernel.apply_to(trainer.model, "loss")
    torch.testing.assert_close(trained(trainer), plain, rtol=1e-5, atol=1e-5)
    assert calls == []
    lines = [record.getMessage() for record in caplog.records if record.name == heads.__name__]
    assert lines == ["loss: runs as TRL has it: the head is a Linear with a forward of its own"]
