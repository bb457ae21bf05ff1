"""The gated MLPs of models, whatever their class, run as one operator, to the same bits; and survive float16."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gemma4_models import IDS, build, step
from transformers.activations import ACT2FN
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioFeedForward, Gemma4TextMLP, Gemma4VisionMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "mlp_bias": True,
    "use_clipped_linears": True,
    "gradient_clipping": 1e10,
    "residual_weight": 0.5,
}


@pytest.fixture(scope="module")
def mlp(kernel) -> Any:
    """``install(model)`` and ``remove(model)``."""
    part = "mlp"
    return SimpleNamespace(
        install=lambda model: kernel.apply_to(model, part),
        remove=lambda model: kernel.remove_from(model, part),
        __name__=f"{kernel.__name__}.integration.mlp.forward",
    )


def make(kind: Any, activation: str = "gelu_pytorch_tanh", dtype: torch.dtype = torch.float32) -> Any:
    names = ("hidden_act", "hidden_activation")
    torch.manual_seed(0)
    layer = kind(SimpleNamespace(**CONFIG, **dict.fromkeys(names, activation)))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.to(dtype)


def results(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), (x, *layer.parameters()), allow_unused=True)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["per layer", "moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gemma4_model_trains_to_the_same_bits(mlp, kind, dtype) -> None:
    model = build(kind, dtype)
    plain = step(model)
    assert mlp.install(model) == mlp.install(model) == model.config.num_hidden_layers
    assert equal(step(model), plain)
    assert mlp.remove(model) == model.config.num_hidden_layers
    assert mlp.remove(model) == 0


@pytest.mark.parametrize("kind", [Gemma4VisionMLP, LlamaMLP, Phi3MLP])
@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "silu", "gelu"])
def test_any_class_of_the_same_structure_runs_to_the_same_bits(mlp, kind, activation) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = make(kind, activation, dtype), torch.randn(2, 5, 16).to(dtype)
        plain = results(layer, x)
        assert mlp.install(layer) == 1
        with torch.profiler.profile() as profile:
            fused = results(layer, x)
        calls = [event.name for event in profile.events()]
        assert any("gated_activation_forward" in name for name in calls)
        assert equal(fused, plain)


def test_what_is_not_covered_runs_as_it_did_and_a_line_says_why(mlp, caplog) -> None:
    class Learned(torch.nn.Module):
        """An activation with a parameter between two projections: no MLP of ours."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.act = torch.nn.PReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.act(self.first(x)))

    class Dropped(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(x), 0.1, self.training)

    known = [make(CLIPMLP, "quick_gelu"), *(make(LlamaMLP, name) for name in ("relu", "gelu_new", "silu"))]
    others = [torch.nn.MultiheadAttention(4, 1), torch.jit.trace(make(LlamaMLP), torch.zeros(1, 16))]
    model = torch.nn.ModuleList([*known, Learned(), make(Dropped), *others])
    model[3].forward = lambda x: x
    kinds = [type(module) for module in model]
    caplog.set_level(logging.INFO, mlp.__name__)
    with pytest.raises(
        ValueError, match=re.escape("expected a model with gated MLPs, down(act(gate(x)) * up(x))")
    ):
        mlp.install(model)
    assert [type(module) for module in model] == kinds
    other = "it computes none of down(act(gate(x)) * up(x)) for silu, gelu_tanh, gelu"
    assert [record.getMessage() for record in caplog.records] == [
        f"mlp: 1 of CLIPMLP ({other}) run as they are",
        f"mlp: 2 of LlamaMLP ({other}) run as they are",
        "mlp: 1 of LlamaMLP (something else replaced its forward) run as they are",
    ]


def test_nothing_is_drawn_of_the_callers_random_numbers(mlp) -> None:
    class Noisy(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(x), 0.1, self.training)

    layers = torch.nn.ModuleList([make(LlamaMLP), Noisy(SimpleNamespace(**CONFIG, hidden_act="silu"))])
    state = torch.get_rng_state()
    assert mlp.install(layers) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_activations_and_projections_with_hooks_are_still_called(mlp) -> None:
    layer, x = make(LlamaMLP), torch.randn(3, 16)
    layer.down_proj.bias.data.zero_()
    plain = layer(x)
    mlp.install(layer)
    layer.up_proj.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    assert torch.allclose(layer(x=x), 2 * plain, atol=1e-6)
    layer.act_fn.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    assert torch.allclose(layer(x), 4 * plain, atol=1e-6)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_on_the_projections_and_checkpointing_train_to_the_same_bits(mlp, order) -> None:
    from peft import LoraConfig, get_peft_model

    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = build("smallest", torch.bfloat16)
        if fused and order == "before":
            assert mlp.install(model) == 3
        config = LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
        tuned = get_peft_model(model, config)
        if fused and order == "after":
            assert mlp.install(tuned) == 3
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(step(tuned))
    assert equal(*results)


def test_copies_run_fused_on_their_own_weights_and_pickles_are_plain(mlp) -> None:
    layer, x = make(Gemma4VisionMLP), torch.randn(3, 16)
    plain = layer(x)
    mlp.install(layer)
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), plain)
    assert type(pickle.loads(pickle.dumps(layer))) is Gemma4VisionMLP
    assert type(copy.deepcopy(layer)) is type(layer)


def test_compiled_it_is_one_graph(mlp) -> None:
    torch._dynamo.reset()
    layer, x = make(Gemma4VisionMLP, dtype=torch.float16), torch.randn(3, 16).half()
    mlp.install(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert equal(results(compiled, x), results(layer, x))


def test_mixed_dtypes_run_as_the_class_does(mlp) -> None:
    layer, x = make(LlamaMLP), torch.randn(3, 16)
    layer.up_proj.register_forward_hook(lambda _module, _inputs, y: y.double())
    layer.down_proj.double()
    plain = layer(x)
    mlp.install(layer)
    assert torch.equal(layer(x), plain)


def train(model: Any, steps: int = 8) -> list[float]:
    """The losses of steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_a_float16_gemma4_whose_mlp_overflows_dies_without_and_trains_with_it(mlp) -> None:
    model = build("dense", torch.float16)
    with torch.no_grad():
        for layer in model.model.layers[1:3]:
            layer.mlp.gate_proj.weight.mul_(4000)
            layer.mlp.up_proj.weight.mul_(4000)
    other = copy.deepcopy(model)
    mlp.install(other)
    assert all(loss != loss for loss in train(model))
    losses = train(other)
    assert losses[-1] < losses[0] - 0.05, losses
    assert all(p.isfinite().all() for p in other.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gemma4s_audio_mlp_takes_an_infinite_activation_for_the_largest_number(mlp, dtype) -> None:
    layer, x = make(Gemma4AudioFeedForward, "silu", dtype), torch.randn(3, 16).to(dtype)
    plain = results(layer, x)
    assert mlp.install(layer) == mlp.install(layer) == 1
    assert equal(results(layer, x), plain)
    with torch.no_grad():
        layer.pre_layer_norm.weight.fill_(1)
        layer.ffw_layer_1.linear.weight.fill_(3e4)
    x[1] = 60
    assert all(g.isfinite().all() for g in results(layer, x))
    mlp.remove(layer)
    assert results(layer, x)[0].isfinite().all() == (dtype != torch.float16)
    assert not any(isinstance(module, Gemma4TextMLP) for module in layer.modules())
    assert type(layer.act_fn) is type(ACT2FN["silu"])
