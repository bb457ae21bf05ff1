"""An implementation chosen for a model: PEFT's copies of modules follow, and models without a use for it say so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_close
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, Llama4TextConfig, LlamaConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
IDS = torch.arange(26).view(2, 13) % 64
COPIES: dict[str, dict[str, Any]] = {
    "experts saved": {"modules_to_save": ["experts"]},
    "attention saved": {"modules_to_save": ["self_attn"], "target_modules": ["lm_head"]},
    "layers replicated": {"layer_replication": [[0, 2], [1, 2]]},
}


def qwen() -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SMALL, **MOE), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return model


def results(model: Any) -> list[torch.Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def both(kernel: ModuleType) -> Any:
    kernel.register()
    kernel.register_attention()
    yield kernel
    kernel.unregister()
    kernel.unregister_attention()


@pytest.mark.parametrize("copies", COPIES)
def test_pefts_copies_run_what_is_set_afterwards(
    both: ModuleType, submodule: Callable[[str], ModuleType], copies: str
) -> None:
    config = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **COPIES[copies]}
    )
    model = get_peft_model(qwen(), config)
    calls = {"experts": 0, "attention": 0}

    def count(module: Any, *_: Any) -> None:
        setters = ("_experts_implementation", "_attn_implementation")
        for name, setter, ours in zip(calls, setters, ("scattermoe", "scattermoe_flash"), strict=True):
            calls[name] += (
                type(module).__name__.lower().endswith(name) and getattr(module.config, setter) == ours
            )

    for module in model.modules():
        module.register_forward_hook(count)
    model.set_experts_implementation("scattermoe")
    model.set_attn_implementation("scattermoe_flash")
    got = results(model)
    layers = 3 if copies == "layers replicated" else 2
    assert calls == {"experts": layers, "attention": layers}
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    expected = results(model)
    assert calls == {"experts": layers, "attention": layers}
    assert_close(got, expected, 1e-3)


def test_models_that_share_a_class_of_config_and_disagree_are_left_alone(both: ModuleType) -> None:
    one, another = qwen(), qwen()
    another.config._experts_implementation_internal = "grouped_mm"
    one.another = another
    copied = get_peft_model(one, LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]))
    copied.set_experts_implementation("scattermoe")
    kept = [
        module.modules_to_save["default"].config._experts_implementation
        for module in copied.modules()
        if isinstance(module, ModulesToSaveWrapper)
    ]
    assert kept == ["grouped_mm"] * 4


def test_unregistering_leaves_transformers_as_it_was(kernel: ModuleType) -> None:
    names = ("set_experts_implementation", "set_attn_implementation", "get_correct_experts_implementation")
    before = [getattr(PreTrainedModel, name) for name in names]
    for _ in range(2):
        kernel.register()
        kernel.register_attention()
    assert all(getattr(PreTrainedModel, name) is not old for name, old in zip(names, before, strict=True))
    for _ in range(2):
        kernel.unregister()
        kernel.unregister_attention()
    assert [getattr(PreTrainedModel, name) for name in names] == before


def llama4() -> Any:
    config = Llama4TextConfig(**SMALL, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1)
    return AutoModelForCausalLM.from_config(config, experts_implementation="scattermoe")


def test_a_model_whose_experts_ask_for_no_implementation_says_so_once(registered: ModuleType) -> None:
    with pytest.warns(
        UserWarning, match=r"Llama4\w+: experts_implementation='scattermoe' changes nothing"
    ) as record:
        model = llama4()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="scattermoe")
        model.set_experts_implementation("eager")
        model.set_experts_implementation("scattermoe")
    assert len([warning for warning in record if "scattermoe" in str(warning.message)]) == 1


class OfAUser(Qwen3MoeForCausalLM):
    """A subclass in a module without experts of its own."""


@pytest.mark.parametrize("name", ["qwen", "subclass", "dense", "another implementation"])
def test_other_models_say_nothing(registered: ModuleType, name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="scattermoe")
        if name == "another implementation":
            llama = Llama4TextConfig(
                **SMALL, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1
            )
            AutoModelForCausalLM.from_config(llama)
        elif name == "dense":
            AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), experts_implementation="scattermoe")
        else:
            kind = Qwen3MoeForCausalLM if name == "qwen" else OfAUser
            config = Qwen3MoeConfig(**SMALL, **MOE)
            kind._from_config(config, experts_implementation="scattermoe")
