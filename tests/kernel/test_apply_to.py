"""Gemma 4 models of every kind, their attention's norms and rotary embedding fused, against the same models without."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import types
import warnings
import weakref
from collections import UserDict
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.backends.debugging import aot_eager
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
)
from transformers.models.gemma4 import modeling_gemma4

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "shared": {"num_hidden_layers": 6, "layer_types": TEXT["layer_types"] + TEXT["layer_types"][:2]}
    | {"num_kv_shared_layers": 3},
    "k=v": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "moe": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "per layer": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 2,
    },
}
SMALLEST = {"num_hidden_layers": 3, "num_kv_shared_layers": 1} | {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"]
}
IDS = torch.arange(2 * 21).view(2, 21) * 7 % 61 + 2


def build(kind: str = "shared", dtype: torch.dtype = torch.float32) -> Any:
    settings = SMALLEST if kind == "smallest" else KINDS[kind]
    model = Gemma4ForCausalLM(Gemma4TextConfig(**{**TEXT, **settings}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1, 0.3)
    return model.to(dtype).train()


def step(model: Any, **inputs: Any) -> list[torch.Tensor]:
    """The loss and all gradients, in the parameters' order."""
    model.zero_grad()
    loss = model(**({"input_ids": IDS, "labels": IDS} | inputs)).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert gradients
    return [loss.detach(), *gradients]


def distance(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    pairs = [(g.double(), e.double()) for g, e in zip(got, exact, strict=True)]
    return (
        float(sum((g - e).square().sum() for g, e in pairs) / sum(e.square().sum() for _, e in pairs)) ** 0.5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_same_and_gradients_are_as_exact(kernel, kind) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        model = build(kind, dtype)
        wide = copy.deepcopy(model).double()
        wide.set_experts_implementation("eager")  # grouped_mm has no float64
        exact = step(wide)
        plain = step(model)
        assert kernel.apply_to(model) == model.config.num_hidden_layers
        fused = step(model)
        assert torch.equal(fused[0], plain[0])
        assert distance(fused[1:], exact[1:]) < max(1.2 * distance(plain[1:], exact[1:]), 1e-6)
        assert distance(fused[1:], plain[1:]) < tolerance


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("shared", torch.float32), ("shared", torch.bfloat16), ("k=v", torch.bfloat16), ("moe", torch.float32)],
)
def test_generated_tokens_are_the_same_with_every_cache(kernel, kind, dtype) -> None:
    model = build(kind, dtype).eval()
    results = []
    for run in (kernel.apply_to, kernel.remove_from):
        run(model)
        for settings in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            # Past the sliding window, and with padding.
            mask = torch.ones(2, 9, dtype=torch.long)
            mask[0, :3] = 0
            settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None} | settings
            results.append(model.generate(IDS[:, :9], attention_mask=mask, **settings))
    assert all(torch.equal(fused, plain) for fused, plain in zip(results[:3], results[3:], strict=True))
    assert results[0].shape == (2, 21)


@pytest.mark.parametrize("kind", ["shared", "k=v"])
def test_with_lora_on_all_projections(kernel, kind) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(build(kind), config)
    plain = step(model)
    assert kernel.apply_to(model) == model.config.num_hidden_layers
    fused = step(model)
    assert len(fused) == 1 + sum("lora_" in name for name, _ in model.named_parameters())
    assert torch.equal(fused[0], plain[0])
    assert distance(fused, plain) < 1e-5


def test_with_every_attention_implementation(kernel) -> None:
    kernel.register_attention("apply_to_flash")
    try:
        for implementation in ("eager", "sdpa", "apply_to_flash"):
            model = build()
            model.set_attn_implementation(implementation)
            plain = step(model)
            kernel.apply_to(model)
            assert distance(step(model), plain) < 1e-5
    finally:
        kernel.unregister_attention()


@pytest.mark.parametrize("tower", [False, True])
def test_only_text_attention_of_a_multimodal_model_changes(kernel, tower) -> None:
    vision = Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    config = Gemma4Config(text_config=Gemma4TextConfig(**TEXT), vision_config=vision if tower else None)
    model = Gemma4ForConditionalGeneration(config).train()
    inputs = {"mm_token_type_ids": torch.zeros_like(IDS)}
    plain = step(model, **inputs)
    assert kernel.apply_to(model) == 4
    fused = step(model, **inputs)
    assert torch.equal(fused[0], plain[0])
    assert distance(fused, plain) < 1e-5


def test_the_unified_model_has_the_same_attention(kernel) -> None:
    unified = pytest.importorskip("transformers.models.gemma4_unified")
    settings = {key: value for key, value in TEXT.items() if key != "hidden_size_per_layer_input"}
    model = unified.Gemma4UnifiedForCausalLM(unified.Gemma4UnifiedTextConfig(**settings)).train()
    plain = step(model)
    assert kernel.apply_to(model) == 4
    got = step(model)
    assert torch.equal(got[0], plain[0])
    assert distance(got, plain) < 1e-5
    assert kernel.remove_from(model) == 4


def test_autocast(kernel) -> None:
    model = build()
    kernel.apply_to(model)
    with torch.autocast("cpu", torch.bfloat16):
        fused = step(model)
        kernel.remove_from(model)
        plain = step(model)
    assert torch.equal(fused[0], plain[0])
    assert distance(fused, plain) < 0.03


def test_float16_autocast_of_a_bfloat16_model(kernel) -> None:
    model = build("shared", torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        plain = step(model)
        kernel.apply_to(model)
        fused = step(model)
    assert torch.equal(fused[0], plain[0])
    assert distance(fused, plain) < 0.03


@pytest.mark.parametrize(
    ("dtype", "projected", "angles"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_projections_and_angles_of_different_dtypes_are_promoted(kernel, dtype, projected, angles) -> None:
    model = build("shared", dtype)
    model.set_attn_implementation("eager")
    model.model.rotary_emb.register_forward_hook(lambda module, args, out: tuple(t.to(angles) for t in out))
    for layer in attentions(model):
        # Attention wants keys and values of one dtype.
        both = torch.promote_types(projected, angles)
        for name, to in (("q_proj", projected), ("k_proj", projected), ("v_norm", both)):
            if hasattr(layer, name):
                getattr(layer, name).register_forward_hook(lambda module, args, out, to=to: out.to(to))
        layer.o_proj.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
    plain = step(model)
    kernel.apply_to(model)
    fused = step(model)
    assert torch.equal(fused[0], plain[0])
    assert distance(fused, plain) < (0.03 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kind", ["shared", "k=v"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_what_it_gives_without(kernel, kind, reentrant) -> None:
    model = build(kind)
    kernel.apply_to(model)
    stored = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    lossy = reentrant and kind == "shared"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fused = step(model)
    kernel.remove_from(model)
    assert any("Reentrant gradient checkpointing loses" in str(each.message) for each in told) == lossy
    assert distance(fused, step(model)) < 1e-5
    if not lossy:
        assert all(torch.equal(f, s) for f, s in zip(fused, stored, strict=True))


class Watched(UserDict):
    """The dictionary of shared states, with weak references to every tensor that was put into any."""

    seen: ClassVar[list[weakref.ref]] = []

    def __setitem__(self, key: str, item: Any) -> None:
        super().__setitem__(key, item)
        if isinstance(item, list | tuple):
            self.seen.extend(weakref.ref(tensor) for tensor in item)

    @classmethod
    def alive(cls) -> int:
        return sum(each() is not None for each in cls.seen)


@pytest.fixture
def watched(monkeypatch) -> Iterator[type[Watched]]:
    """``Watched`` in the model's code, and no garbage collector: it would not run for a GPU's memory either."""
    monkeypatch.setattr(modeling_gemma4, "UserDict", Watched)
    Watched.seen = []
    gc.collect()
    gc.disable()
    yield Watched
    gc.enable()


def checkpointed(kernel: Any, kind: str) -> Any:
    model = build(kind)
    kernel.apply_to(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.parametrize(
    ("kind", "backward"),
    [("shared", "whole"), ("shared", "none"), ("shared", "upper layers"), ("dense", "none")],
)
def test_memory_of_shared_states_is_flat_over_checkpointed_steps(kernel, watched, kind, backward) -> None:
    model = checkpointed(kernel, kind)
    steps = 50 if backward != "upper layers" else 10
    top = [p for p in model.model.layers[-1].parameters() if p.requires_grad]
    bottom = [p for p in model.model.layers[1].parameters() if p.requires_grad]
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        # Between forward and backward the checkpoints of the layers that read them hold keys and values of both kinds.
        assert watched.alive() == (4 if kind == "shared" else 0)
        if backward == "whole":
            loss.backward()
            assert watched.alive() == 0
        elif backward == "upper layers":
            torch.autograd.grad(loss, top, retain_graph=True)
            torch.autograd.grad(loss, bottom)
        del loss
        assert watched.alive() == 0
    assert len(watched.seen) >= steps * 4


def test_a_checkpointed_graph_runs_backward_twice(kernel) -> None:
    model = checkpointed(kernel, "shared")
    once = step(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    loss.backward()
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    assert distance(twice, [2 * g for g in once[1:]]) < 1e-6


def test_whoever_asks_for_the_shared_states_gets_them(kernel) -> None:
    model = build()
    kernel.apply_to(model)
    states = model.model(IDS, return_shared_kv_states=True).shared_kv_states
    assert {kind: [list(t.shape) for t in pair] for kind, pair in states.items()} == {
        "sliding_attention": [[2, 2, 21, 16]] * 2,
        "full_attention": [[2, 2, 21, 32]] * 2,
    }


def test_outputs_that_transformers_records_are_recorded(kernel) -> None:
    model = build().eval()
    model.set_attn_implementation("eager")
    kernel.apply_to(model)
    out = model(IDS, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 6
    assert len(out.hidden_states) == 7
    kernel.remove_from(model)
    plain = model(IDS, output_attentions=True)
    assert all(torch.equal(a, b) for a, b in zip(out.attentions, plain.attentions, strict=True))


def test_compiled_model_has_the_operator_in_one_graph(kernel) -> None:
    model = build("smallest")
    kernel.apply_to(model)
    eager = step(model)
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    got = compiled(input_ids=IDS, labels=IDS, use_cache=False).loss
    assert torch.allclose(got, eager[0], rtol=1e-6)
    targets = [str(node.target) for node in graphs[-1].graph.nodes]
    # Three queries, two keys and two values.
    assert sum("norm_rotary_forward" in target for target in targets) == 7


def fused(layer: torch.nn.Module) -> bool:
    return any(each.__name__.startswith("Fused") for each in type(layer).__mro__)


def attentions(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, modeling_gemma4.Gemma4TextAttention)]


def test_it_is_idempotent_reversible_and_leaves_the_state_as_it_is(kernel) -> None:
    model = build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert kernel.remove_from(model) == 0
    assert kernel.apply_to(model) == kernel.apply_to(model) == 6
    assert all(fused(layer) for layer in attentions(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert kernel.remove_from(model) == 6
    assert kernel.remove_from(model) == 0
    assert not any(fused(layer) for layer in attentions(model))
    assert {type(layer) for layer in attentions(model)} == {modeling_gemma4.Gemma4TextAttention}
    layer = attentions(model)[2]
    assert kernel.apply_to(layer) == 1
    assert [fused(each) for each in attentions(model)] == [False, False, True, False, False, False]


def test_a_copy_runs_fused_on_its_own_weights(kernel) -> None:
    model = build()
    kernel.apply_to(model)
    twin = copy.deepcopy(model)
    assert all(layer.forward.__self__ is layer for layer in attentions(twin))
    attentions(twin)[0].q_norm.weight.data.mul_(3)
    assert not torch.equal(step(twin)[0], step(model)[0])
    assert kernel.remove_from(twin) == 6
    assert all(fused(layer) for layer in attentions(model))


def replica(module: Any) -> Any:
    """What ``nn.DataParallel`` makes of every module for every device."""
    twin = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(twin, name, parameter)
    return twin


@pytest.mark.parametrize("duplicate", [copy.copy, replica])
def test_a_shallow_copy_runs_fused_on_its_own_weights(kernel, duplicate) -> None:
    model = build("dense")
    kernel.apply_to(model)
    layer = attentions(model)[0]
    hidden = torch.randn(2, 5, 32)
    angles = model.model.rotary_emb(hidden, torch.arange(5)[None], "sliding_attention")

    def run(each: Any) -> torch.Tensor:
        return each(hidden, angles, None, {})[0]

    before = run(layer)
    twin = duplicate(layer)
    assert fused(twin)
    assert torch.equal(run(twin), before)
    twin._modules = dict(layer._modules, q_norm=duplicate(layer.q_norm))
    twin.q_norm.with_scale = False
    got = run(twin)
    assert torch.equal(run(layer), before)
    assert kernel.remove_from(twin) == 1
    assert fused(layer)
    assert torch.equal(run(twin), got)
    assert not torch.allclose(got, before)


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_is_of_the_model_alone(kernel, protocol) -> None:
    model = build()
    kernel.apply_to(model)
    written = pickle.dumps(model, protocol)
    assert kernel.__name__.split(".")[0].encode() not in written
    read = pickle.loads(written)
    assert not any(fused(layer) for layer in attentions(read))
    assert torch.equal(step(read)[0], step(model)[0])
    assert kernel.remove_from(read) == 0
    assert kernel.apply_to(read) == 6
    assert torch.equal(step(read)[0], step(model)[0])


def test_norms_with_hooks_or_wrappers_run_as_they_are(kernel) -> None:
    model = build()
    calls = []
    attentions(model)[0].q_norm.register_forward_hook(lambda module, args, out: (calls.append(1), 2 * out)[1])
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["k_norm"]))
    for name, parameter in tuned.named_parameters():
        if "k_norm.modules_to_save" in name:
            # The copy that trains differs from the original, which must not be read.
            torch.nn.init.normal_(parameter, 1, 0.3)
    plain = step(tuned)
    kernel.apply_to(tuned)
    got = step(tuned)
    assert len(calls) == 2
    assert torch.equal(got[0], plain[0])
    assert distance(got, plain) < 1e-5


@pytest.mark.filterwarnings("ignore:.*ackward hook")
@pytest.mark.parametrize(
    "register", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]
)
def test_hooks_on_all_modules_see_the_norms(kernel, register) -> None:
    model = build("smallest")
    norms = {id(norm) for layer in attentions(model) for norm in layer.children() if "Norm" in str(norm)}
    calls = []
    handle = getattr(torch.nn.modules.module, f"register_module_{register}")(
        lambda module, *_: calls.append(id(module)) if id(module) in norms else None
    )
    try:
        plain = step(model)
        kernel.apply_to(model)
        got = step(model)
    finally:
        handle.remove()
    assert torch.equal(got[0], plain[0])
    assert set(calls) == norms
    assert all(calls.count(norm) == 2 for norm in norms)


def test_it_goes_below_hooks_of_accelerate_and_stays_when_they_go(kernel) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += 1
            return args, kwargs

    model = build()
    layer = attentions(model)[0]
    add_hook_to_module(layer, Counting())
    add_hook_to_module(attentions(model)[1].q_norm, Counting())
    plain = step(model)
    assert kernel.apply_to(model) == 6
    got = step(model)
    assert Counting.calls == 4
    assert torch.equal(got[0], plain[0])
    assert layer._old_forward.__func__ is attentions(model)[2].forward.__func__
    remove_hook_from_module(layer)
    assert kernel.remove_from(model) == 6
    assert torch.equal(step(model)[0], plain[0])


def test_a_model_without_such_attention_is_refused(kernel) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    message = (
        "expected a model with layers of Gemma4TextAttention or Gemma4UnifiedTextAttention, got a Sequential"
    )
    with pytest.raises(ValueError, match=message):
        kernel.apply_to(model)
    assert kernel.remove_from(model) == 0


def test_a_fused_layer_that_was_subclassed_is_not_undone(kernel) -> None:
    model = build()
    kernel.apply_to(model)
    layer = attentions(model)[1]
    layer.__class__ = type("Sharded", (type(layer),), {})
    assert kernel.apply_to(model) == 6
    message = "remove_from: model.layers.1.self_attn: something else made it a Sharded after apply_to; undo that first"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        kernel.remove_from(model)
    assert all(fused(layer) for layer in attentions(model))


class Subclass(modeling_gemma4.Gemma4TextAttention):
    pass


class Overriding(modeling_gemma4.Gemma4TextAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_subclass_runs_fused_unless_it_has_its_own_forward(kernel) -> None:
    model = build()
    attentions(model)[1].__class__ = Subclass
    assert kernel.apply_to(model) == 6
    kernel.remove_from(model)
    attentions(model)[3].__class__ = Overriding
    message = "apply_to: model.layers.3.self_attn: Overriding overrides the forward of Gemma4TextAttention; nothing was"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        kernel.apply_to(model)
    assert not any(fused(layer) for layer in attentions(model))


def test_a_layer_that_something_else_replaced_is_refused(kernel) -> None:
    model = build()
    layer = attentions(model)[2]
    layer.forward = types.MethodType(lambda self, *args, **kwargs: None, layer)
    message = "apply_to: model.layers.2.self_attn: something else replaced its forward already"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        kernel.apply_to(model)
    assert not fused(attentions(model)[0])


def test_another_transformers_is_refused(kernel, monkeypatch) -> None:
    model = build()
    monkeypatch.setattr(modeling_gemma4.Gemma4TextAttention, "forward", lambda self, hidden_states: None)
    message = (
        r"model.layers.0.self_attn: this transformers' Gemma4TextAttention.forward takes \(self, hidden_s"
    )
    with pytest.raises(NotImplementedError, match=message):
        kernel.apply_to(model)
