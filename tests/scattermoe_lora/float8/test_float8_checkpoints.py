"""What float8 training saves, who reads it, and what is refused with a message."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import TRITON
from safetensors.torch import load_file
from test_float8_training import IDS, gemma4, llama
from transformers import (
    AutoModelForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

pytestmark = pytest.mark.skipif(TRITON, reason="loads models, which the interpreter is too slow for")


def qwen3_moe() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=2,
        num_experts_per_tok=1,
    )
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.set_experts_implementation("scattermoe")
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_transformers_reads_what_is_saved_by_the_keys_of_its_own_fp8(
    registered: ModuleType, tmp_path: Path
) -> None:
    model = qwen3_moe()
    registered.train_in_float8(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name, shape in (("self_attn.q_proj", [256, 256]), ("mlp.experts.1.up_proj", [256, 256])):
        weight, scales = (saved[f"model.layers.0.{name}.{key}"] for key in ("weight", "weight_scale_inv"))
        assert (weight.dtype, list(weight.shape)) == (torch.float8_e4m3fn, shape)
        assert (scales.dtype, list(scales.shape)) == (torch.float32, [2, 2])
    for name in ("lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"):
        assert saved[f"{name}.weight"].dtype == torch.bfloat16
    # Without a GPU transformers decodes it.
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, experts_implementation="scattermoe"
    )
    assert not any(hasattr(p, "codes") for p in loaded.parameters())
    # And from there training goes on with the same codes.
    registered.train_in_float8(loaded)
    for (name, weight), other in zip(loaded.named_parameters(), model.parameters(), strict=True):
        if hasattr(weight, "codes"):
            assert torch.equal(weight.codes, other.codes), name
            assert torch.equal(weight.scales, other.scales), name


@pytest.mark.parametrize("build", [gemma4, llama])
def test_a_state_dict_loads_with_the_same_bits_and_so_do_dense_weights(
    registered: ModuleType, build: Any, tmp_path: Path
) -> None:
    model, other = build(), build()
    dense = copy.deepcopy(model.state_dict())
    for each in (model, other):
        registered.train_in_float8(each)
    exact = logits(model)
    assert not torch.equal(logits(other), exact)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), dense):
        for parameter in other.parameters():
            parameter.detach().zero_()
        other.load_state_dict(state)
        assert torch.equal(logits(other), exact)

    state = model.state_dict()
    name = next(key for key in state if key.endswith("q_proj.weight"))
    for change, message in (
        ({f"{name}_scale_inv": None}, f"{name}: expected scales under {name}_scale_inv, got none"),
        (
            {f"{name}_scale_inv": torch.ones(3, 3)},
            f"{name}_scale_inv: expected [1, 1] for blocks of 128 x 128",
        ),
        ({f"{name}_scale_inv": torch.full((1, 1), torch.nan)}, f"{name}_scale_inv: expected finite scales"),
        ({name: torch.zeros(8, dtype=torch.uint8)}, f"{name}: expected float8_e4m3fn with"),
        ({name: torch.full_like(dense[name], torch.nan)}, f"{name}: expected finite weights"),
    ):
        bad = {key: value for key, value in ({**state, **change}).items() if value is not None}
        with pytest.raises(ValueError, match=re.escape(message)):
            other.load_state_dict(bad)


def test_trainer_accumulates_checkpoints_and_resumes_with_weights_and_moments(
    registered: ModuleType, tmp_path: Path
) -> None:
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]

    def trainer(steps: int) -> Trainer:
        torch.manual_seed(0)
        model = llama()
        registered.train_in_float8(model)
        settings = TrainingArguments(
            tmp_path,
            logging_steps=1,
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        optimizer = registered.Adafactor(model.parameters(), lr=1e-3)
        return Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None))

    class Begin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loaded.append((copy.deepcopy(kwargs["model"].state_dict()), kwargs["optimizer"].state_dict()))

    loaded: list[Any] = []
    first = trainer(2)
    first.train()
    resumed = trainer(4)
    resumed.add_callback(Begin())
    resumed.train(resume_from_checkpoint=True)
    losses = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    ((state, optimizer),) = loaded
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for number, moments in first.optimizer.state_dict()["state"].items():
        assert {value.dtype for value in optimizer["state"][number].values()} == {torch.float32}
        assert all(value.shape == optimizer["state"][number][name].shape for name, value in moments.items())
    assert {int(moments["step"]) for moments in resumed.optimizer.state_dict()["state"].values()} == {4}

    adamw = torch.optim.AdamW(resumed.model.lm_head.parameters())
    resumed.model.lm_head.weight.grad = torch.ones_like(resumed.model.lm_head.weight)
    adamw.step()
    with pytest.raises(
        ValueError, match="expected rows and columns of second moments, got exp_avg, exp_avg_sq, step"
    ):
        registered.Adafactor(resumed.model.lm_head.parameters()).load_state_dict(adamw.state_dict())
    other = registered.Float8Optimizer(torch.optim.AdamW, resumed.model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="got columns, rows, step; the checkpoint is Adafactor's"):
        other.load_state_dict(resumed.optimizer.state_dict())

    # Trainer's own optimizer, and whatever reads weights as dense.
    resumed.model.zero_grad()
    resumed.model(input_ids=IDS, labels=IDS).loss.backward()
    layers = list(resumed.model.model.layers.parameters())
    for optimizer, way in (
        *((torch.optim.AdamW, way) for way in ({}, {"fused": True}, {"foreach": True})),
        (torch.optim.SGD, {"fused": True}),
        (torch.optim.RMSprop, {"foreach": True}),
    ):
        with pytest.raises(NotImplementedError, match="take Adafactor of this package, or Float8Optimizer"):
            optimizer(layers, **way).step()
    resumed.optimizer = None
    with pytest.raises(
        ValueError, match=r"expected one for weights in float8 such as model\.layers\.0\.self"
    ):
        registered.check_training(resumed)
    resumed.optimizer_cls_and_kwargs = (registered.Adafactor, {"lr": 1e-3})
    registered.check_training(resumed)


def test_what_cannot_be_trained_is_refused_by_name(registered: ModuleType) -> None:
    model = gemma4()
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="experts_implementation='eager'; call register"):
        registered.train_in_float8(model)
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight: expected finite weights"):
        registered.train_in_float8(model)
    assert not any(hasattr(p, "codes") for p in model.parameters())
    registered.train_in_float8(model, skip_modules=["layers.1"])
    assert {n.split(".")[2] for n, p in model.named_parameters() if hasattr(p, "codes")} == {"0"}
    with pytest.raises(ValueError, match="expected linear layers or experts in Embedding, got none"):
        registered.train_in_float8(torch.nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="expected a list of names, got the string 'lm_head'"):
        registered.train_in_float8(model, skip_modules="lm_head")
    with pytest.raises(
        NotImplementedError, match=r"weight: expected a GPU that multiplies in float8 .*, got cpu; leave"
    ):
        registered.train_in_float8(llama(), float8_products=True)
    for setting, value in (("lr", -1), ("clip_threshold", 0), ("decay_rate", 1), ("weight_decay", -1)):
        with pytest.raises(ValueError, match=f"{setting}: expected .*, got {value}"):
            registered.Adafactor(model.parameters(), **{setting: value})
