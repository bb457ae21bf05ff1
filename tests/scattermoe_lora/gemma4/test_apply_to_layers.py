"""The layers that `apply_to` replaces and `remove_from` puts back: copies, pickles, hooks, subclasses, refusals."""

from __future__ import annotations

import copy
import pickle
import re
import types
from typing import Any

import pytest
import torch
from gemma4_models import attentions, build, distance, step
from peft import LoraConfig, get_peft_model
from transformers.models.gemma4 import modeling_gemma4


def fused(layer: torch.nn.Module) -> bool:
    classes: list[Any] = list(type(layer).__mro__)
    return any(base.__name__ == kind.__name__ for kind in classes for base in kind.__bases__)


def test_it_is_idempotent_reversible_and_leaves_the_state_as_it_is(kernel) -> None:
    model = build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert kernel.remove_from(model, "attention") == 0
    assert kernel.apply_to(model, "attention") == kernel.apply_to(model, "attention") == 6
    assert all(fused(layer) for layer in attentions(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert kernel.remove_from(model, "attention") == 6
    assert kernel.remove_from(model, "attention") == 0
    assert not any(fused(layer) for layer in attentions(model))
    assert {type(layer) for layer in attentions(model)} == {modeling_gemma4.Gemma4TextAttention}
    layer = attentions(model)[2]
    assert kernel.apply_to(layer, "attention") == 1
    assert [fused(layer) for layer in attentions(model)] == [False, False, True, False, False, False]


def test_a_copy_runs_fused_on_its_own_weights(kernel) -> None:
    model = build()
    kernel.apply_to(model, "attention")
    twin = copy.deepcopy(model)
    assert all(layer.forward.__self__ is layer for layer in attentions(twin))
    attentions(twin)[0].q_norm.weight.data.mul_(3)
    assert not torch.equal(step(twin)[0], step(model)[0])
    assert kernel.remove_from(twin, "attention") == 6
    assert all(fused(layer) for layer in attentions(model))


def replica(module: Any) -> Any:
    """The replica that ``nn.DataParallel`` makes of every module for every device."""
    twin = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(twin, name, parameter)
    return twin


@pytest.mark.parametrize("duplicate", [copy.copy, replica])
def test_a_shallow_copy_runs_fused_on_its_own_weights(kernel, duplicate) -> None:
    model = build("dense")
    kernel.apply_to(model, "attention")
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
    assert kernel.remove_from(twin, "attention") == 1
    assert fused(layer)
    assert torch.equal(run(twin), got)
    assert not torch.allclose(got, before)


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_is_of_the_model_alone(kernel, protocol) -> None:
    model = build()
    kernel.apply_to(model, "attention")
    written = pickle.dumps(model, protocol)
    assert kernel.__name__.split(".")[0].encode() not in written
    read = pickle.loads(written)
    assert not any(fused(layer) for layer in attentions(read))
    assert torch.equal(step(read)[0], step(model)[0])
    assert kernel.remove_from(read, "attention") == 0
    assert kernel.apply_to(read, "attention") == 6
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
    kernel.apply_to(tuned, "attention")
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
        kernel.apply_to(model, "attention")
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
    assert kernel.apply_to(model, "attention") == 6
    got = step(model)
    assert Counting.calls == 4
    assert torch.equal(got[0], plain[0])
    assert layer._old_forward.__func__ is attentions(model)[2].forward.__func__
    remove_hook_from_module(layer)
    assert kernel.remove_from(model, "attention") == 6
    assert torch.equal(step(model)[0], plain[0])


def test_a_model_without_such_attention_is_refused(kernel) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    message = (
        "expected a model with layers of Gemma4TextAttention or Gemma4UnifiedTextAttention, got a Sequential"
    )
    with pytest.raises(ValueError, match=message):
        kernel.apply_to(model, "attention")
    assert kernel.remove_from(model, "attention") == 0


def test_a_fused_layer_that_was_subclassed_is_not_undone(kernel) -> None:
    model = build()
    kernel.apply_to(model, "attention")
    layer = attentions(model)[1]
    layer.__class__ = type("Sharded", (type(layer),), {})
    assert kernel.apply_to(model, "attention") == 6
    message = "remove_from: model.layers.1.self_attn: something else made it a Sharded after apply_to; undo that first"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        kernel.remove_from(model, "attention")
    assert all(fused(layer) for layer in attentions(model))


class Subclass(modeling_gemma4.Gemma4TextAttention):
    pass


class Overriding(modeling_gemma4.Gemma4TextAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_subclass_runs_fused_unless_it_has_its_own_forward(kernel) -> None:
    model = build()
    attentions(model)[1].__class__ = Subclass
    assert kernel.apply_to(model, "attention") == 6
    kernel.remove_from(model, "attention")
    attentions(model)[3].__class__ = Overriding
    message = "apply_to: model.layers.3.self_attn: Overriding overrides the forward of Gemma4TextAttention; nothing was"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        kernel.apply_to(model, "attention")
    assert not any(fused(layer) for layer in attentions(model))


def test_a_layer_that_something_else_replaced_is_refused(kernel) -> None:
    model = build()
    layer = attentions(model)[2]
    layer.forward = types.MethodType(lambda self, *args, **kwargs: None, layer)
    message = "apply_to: model.layers.2.self_attn: something else replaced its forward already"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        kernel.apply_to(model, "attention")
    assert not fused(attentions(model)[0])


def test_another_transformers_is_refused(kernel, monkeypatch) -> None:
    model = build()
    monkeypatch.setattr(modeling_gemma4.Gemma4TextAttention, "forward", lambda self, hidden_states: None)
    message = (
        r"model.layers.0.self_attn: this transformers' Gemma4TextAttention.forward takes \(self, hidden_s"
    )
    with pytest.raises(NotImplementedError, match=message):
        kernel.apply_to(model, "attention")
