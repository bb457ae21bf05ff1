"""PEFT's LoRA on the dense projections of real models, fused: the same steps, and everything as it was after."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from gemma4_models import build, distance, step
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(model: Any, targets: list[str] | None = None, **options: Any) -> Any:
    """The model with adapters whose B is not zero."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets or ALL} | options
    model = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


class Calls:
    """The number of projections in each call of the operator."""

    def __init__(self, submodule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        products = submodule("ops.lora_linear.products")
        forward = products.forward

        def counted(operands: Any) -> Any:
            self.sizes.append(len(operands.weights))
            return forward(operands)

        monkeypatch.setattr(products, "forward", counted)


@pytest.fixture
def calls(submodule, monkeypatch) -> Calls:
    return Calls(submodule, monkeypatch)


def close(got: list[torch.Tensor], exact: list[torch.Tensor], tolerance: float = 2e-5) -> None:
    assert abs(got[0] - exact[0]) < tolerance * exact[0].abs()
    assert distance(got[1:], exact[1:]) < tolerance


# Of a layer: queries, keys and values; output; gate and up; down.
PER_LAYER = [3, 1, 2, 1]


@pytest.mark.parametrize(
    ("kind", "targets", "sizes"),
    [
        ("dense", ALL, PER_LAYER * 4),
        # The third and last layer has no keys and values of its own.
        ("smallest", ALL, [*PER_LAYER * 2, 1, 1, 2, 1]),
        # In full attention layers values are keys.
        ("k=v", ALL, [*PER_LAYER, 2, 1, 2, 1] * 2),
        # On some projections only: keys are the base model's.
        ("dense", ["q_proj", "v_proj", "up_proj"], [2, 1] * 4),
    ],
)
def test_a_step_is_pefts_and_layers_of_one_input_are_one_call(kernel, calls, kind, targets, sizes) -> None:
    model = lora(build(kind), targets)
    expected = step(model)
    assert kernel.apply_to(model, "projections") == sum(sizes)
    close(step(model), expected)
    assert calls.sizes == sizes
    assert kernel.remove_from(model, "projections") == sum(sizes)
    calls.sizes.clear()
    assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))
    assert not calls.sizes
    assert kernel.remove_from(model, "projections") == 0


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen2"])
def test_other_families_are_grouped_by_their_own_forward(kernel, calls, family) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = lora(getattr(transformers, f"{family}ForCausalLM")(config).train())
    expected = step(model)
    kernel.apply_to(model, "projections")
    close(step(model), expected)
    assert calls.sizes == PER_LAYER * 2


def test_other_fused_parts_of_the_model_stand_beside(kernel, calls) -> None:
    model = lora(build("smallest"))
    expected = step(model)
    attention_layers, projections = 3, 2 * 7 + 5
    assert kernel.apply_to(model, "attention", "projections") == attention_layers + projections
    close(step(model), expected, 1e-4)
    assert calls.sizes == [*PER_LAYER * 2, 1, 1, 2, 1]
    assert kernel.remove_from(model) == attention_layers + projections
    assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))


def test_checkpointing_gives_the_same_step_with_dropout(kernel) -> None:
    model = lora(build("smallest"), lora_dropout=0.3)
    kernel.apply_to(model, "projections")
    torch.manual_seed(2)
    expected = step(model)
    torch.manual_seed(3)
    assert not torch.equal(step(model)[0], expected[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(2)
    close(step(model), expected)
    # In evaluation nothing is dropped.
    model.eval()
    assert torch.equal(step(model)[0], step(model)[0])


def test_a_recomputation_draws_the_masks_of_a_forward_without_gradients(kernel) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = lora(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).train(), lora_dropout=0.3)
    kernel.apply_to(model, "projections")
    model.enable_input_require_grads()
    results = []
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(2)
        results.append(step(model))
    close(*results)


@pytest.mark.parametrize("tokens", [7, 30000])
def test_without_gradients_large_layers_are_computed_alone_and_small_ones_by_peft(
    kernel, calls, tokens
) -> None:
    model, x = lora(Layer(), TARGETS), X.repeat(1, 3000, 1)[:, :tokens]
    with torch.no_grad():
        expected = model(x)
        kernel.apply_to(model, "projections")
        got = model(x)
    assert calls.sizes == ([] if tokens == 7 else [1, 1])
    assert torch.equal(got, expected) if tokens == 7 else torch.allclose(got, expected, atol=1e-5)


class Layer(nn.Module):
    """Two projections of one input."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(12, 10, bias=bias)
        self.second = nn.Linear(12, 10, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).sin() * self.second(x)


TARGETS = ["first", "second"]
X = torch.linspace(-1, 1, 2 * 5 * 12).view(2, 5, 12)


def run(model: nn.Module, x: torch.Tensor = X) -> list[torch.Tensor]:
    """Output and gradients."""
    x = x.detach().requires_grad_()
    y = model(x)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(y.float().sin().sum(), leaves, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def assert_alike(got: list[torch.Tensor], exact: list[torch.Tensor], tolerance: float = 2e-6) -> None:
    assert [t.dtype for t in got] == [t.dtype for t in exact]
    for a, b in zip(got, exact, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"second": 7}},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_adapters_of_every_kind_give_pefts_result(kernel, calls, options) -> None:
    model = lora(Layer(bias=True), TARGETS, **options)
    expected = run(model)
    kernel.apply_to(model, "projections")
    assert_alike(run(model), expected)
    assert calls.sizes == [2]


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_close_as_pefts(kernel, adapter_dtype, autocast) -> None:
    model = lora(Layer(bias=True), TARGETS)
    exact = run(copy.deepcopy(model).double(), X.double())
    if not autocast:
        model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    x = X if autocast else X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = run(model, x)
        kernel.apply_to(model, "projections")
        got = run(model, x)
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    for ours, theirs, right in zip(got, expected, exact, strict=True):
        errors = [float((t.double() - right).norm() / right.norm()) for t in (ours, theirs)]
        assert errors[0] < max(2 * errors[1], 6e-3), errors


def test_adapters_are_added_switched_disabled_merged_and_deleted_as_before(kernel, calls) -> None:
    model = lora(Layer(), TARGETS)
    kernel.apply_to(model, "projections")
    plain = lora(Layer(), TARGETS)
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        each.add_adapter("other", LoraConfig(r=3, target_modules=["first"], lora_dropout=0.2))
    other = {name: torch.randn_like(p) for name, p in plain.named_parameters() if "other" in name}
    for each in (model, plain):
        each.load_state_dict(other, strict=False)
        each.eval()
    for active in ("other", ["default", "other"], "default"):
        for each in (model, plain):
            each.base_model.set_adapter(active)
        assert_alike(run(model), run(plain))
    calls.sizes.clear()
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(X), plain(X))
    for each in (model, plain):
        each.merge_adapter()
    assert torch.equal(model(X), plain(X))
    assert not calls.sizes
    for each in (model, plain):
        each.unmerge_adapter()
        each.delete_adapter("other")
    assert_alike(run(model), run(plain))
    assert calls.sizes == [2]
    with pytest.warns(UserWarning, match="each sample of the batch has an adapter of its own"):
        mixed = model(X, adapter_names=["default", "__base__"])
    assert torch.equal(mixed, plain(X, adapter_names=["default", "__base__"]))
    # What is left behind is the base model, as PEFT leaves it.
    assert type(model.unload().first) is nn.Linear


def test_copies_run_fused_on_their_own_weights_and_pickles_need_no_kernel(kernel, calls) -> None:
    model = lora(Layer(), TARGETS)
    expected = run(model)
    kernel.apply_to(model, "projections")
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_alike(run(twin), expected)
    assert calls.sizes == [1, 1]
    assert kernel.apply_to(twin, "projections") == 2
    assert_alike(run(twin), expected)
    assert calls.sizes == [1, 1, 2]
    stream = io.BytesIO()
    torch.save(twin, stream)
    assert b"Fused" not in stream.getvalue()
    stream.seek(0)
    assert_alike(run(torch.load(stream, weights_only=False)), expected)


def test_what_is_not_covered_runs_as_it_did_and_says_why(kernel, submodule, calls, monkeypatch) -> None:
    forward = submodule("integration.projections.forward")

    def runs_as_before(model: Any, reason: str) -> None:
        monkeypatch.setattr(forward, "_warned", set())
        expected = run(model)
        calls.sizes.clear()
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            kernel.apply_to(model, "projections")
            got = run(model)
        assert [reason in str(warning.message) for warning in raised] == [True]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model)
        assert not calls.sizes

    runs_as_before(lora(Layer(), TARGETS, use_dora=True), "another kind than LoRA (DoraLinearVariant)")
    hooked = lora(Layer(), TARGETS)
    for layer in (hooked.base_model.model.first, hooked.base_model.model.second):
        layer.lora_A["default"].register_forward_hook(lambda module, args, y: y * 2)
    runs_as_before(hooked, "adapter default has hooks")
    # Of two layers, one that something else has got hold of; the other runs fused.
    replaced = lora(Layer(), TARGETS)
    layer = replaced.base_model.model.first
    layer.forward = partial(type(layer).forward, layer)
    expected = run(replaced)
    with pytest.warns(
        UserWarning, match=r"fused: base_model.model\.first: something else replaced its forward"
    ):
        assert kernel.apply_to(replaced, "projections") == 1
    assert_alike(run(replaced), expected)
    assert calls.sizes == [1]
    with pytest.raises(
        ValueError, match="expected a model with PEFT's LoRA on linear layers, got a Layer without"
    ):
        kernel.apply_to(Layer(), "projections")


class Quantized(nn.Linear):
    """A base layer that computes in its own way: its weight is int8 with a scale for each row."""

    def __init__(self, linear: nn.Linear, view: bool = False) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.view = nn.Buffer(scale), view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))
        return y.view(1, *y.shape)[0] if self.view else y


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_base_layers_are_called_and_added_to(kernel, calls, view, dtype) -> None:
    model = lora(Layer(), TARGETS, lora_bias=True)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.base_layer = Quantized(layer.base_layer, view)
    expected = run(model, X.to(dtype))
    kernel.apply_to(model, "projections")
    assert_alike(run(model, X.to(dtype)), expected, 2e-6 if dtype == torch.float32 else 2e-2)
    # A base layer with hooks is such a layer, too. What a hook keeps stays what it was.
    hooked = lora(Layer(), TARGETS)
    seen: list[torch.Tensor] = []
    base = hooked.base_model.model.first.base_layer
    base.register_forward_hook(lambda module, args, y: seen.append(y) or y * 2)
    base.register_forward_hook(lambda module, args, y: seen.append(y))
    expected = run(hooked)
    kernel.apply_to(hooked, "projections")
    assert_alike(run(hooked), expected)
    assert all(torch.equal(seen[i], seen[i + 2]) for i in range(2))
    assert calls.sizes == [1]


def test_other_base_layers_drop_on_the_low_rank_path_alone(kernel) -> None:
    model = lora(Layer(), TARGETS, lora_dropout=0.4)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.base_layer = Quantized(layer.base_layer)
    torch.manual_seed(5)
    expected = run(model)
    kernel.apply_to(model, "projections")
    torch.manual_seed(5)
    assert_alike(run(model), expected)


def test_a_result_is_taken_only_for_the_input_and_parameters_that_it_was_computed_with(kernel) -> None:
    model = lora(Layer(), TARGETS)
    kernel.apply_to(model, "projections")
    first, second = model.base_model.model.first, model.base_model.model.second
    x, other = X.clone(), X.flip(0)

    def alone(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return second(x)

    first(x)
    assert torch.allclose(second(other), alone(other))
    first(x)
    x.mul_(2)
    assert torch.allclose(second(x), alone(x))
    first(x)
    second.lora_B["default"].weight.data.mul_(1)  # .data does not count as a change,
    with torch.no_grad():
        second.lora_B["default"].weight.mul_(3)  # this does.
    assert torch.allclose(second(x), alone(x))
    first(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert second(x).dtype == torch.bfloat16
    first(x)
    with model.disable_adapter():
        assert torch.equal(second(x), second.base_layer(x))


def test_results_wait_alike_in_a_forward_and_its_recomputation(kernel, calls) -> None:
    model = lora(Layer(), TARGETS)
    kernel.apply_to(model, "projections")
    layer = model.base_model.model
    # Nothing but the layers' results keeps the first one.
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
            layer(X.clone().requires_grad_().sin())
    assert calls.sizes == [2, 2]
    # What a call that failed left behind is gone with the next projection.
    hidden = X.clone().requires_grad_().sin()
    alive = weakref.ref(hidden)
    layer.first(hidden)
    del hidden
    layer.first(X)
    gc.collect()
    assert alive() is None


def test_groups_are_the_calls_with_one_unchanged_variable(submodule) -> None:
    called_together = submodule("integration.projections.groups").called_together

    class Parent(nn.Module):
        def forward(self, x: Any, states: Any = None) -> Any:
            q = self.q(x).view(1)
            if states is None:
                k = self.k(x)
                v = self.v(x) if self.v is not None else k
            else:
                k, v = self.k(states), self.v2(states)
            x = self.after(x)
            x = self.last(x)
            x += 1
            return self.a(x), self.b(x), self.c(x, 1), q, k, v

    assert called_together(Parent.forward) == [["q", "k", "v", "after"], ["k", "v2"], ["a", "b"]]
    assert called_together(len) == []


def test_a_compiled_step_is_the_same(kernel) -> None:
    model = lora(Layer(), TARGETS)
    expected = run(model)
    kernel.apply_to(model, "projections")
    torch._dynamo.reset()
    assert_alike(run(torch.compile(model, fullgraph=True, backend="aot_eager")), expected)


def test_an_adapter_that_was_trained_fused_loads_into_a_plain_model(kernel, tmp_path) -> None:
    model = lora(build("smallest"))
    kernel.apply_to(model, "projections")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    loss = model(input_ids=torch.arange(2, 9).view(1, 7), labels=torch.arange(2, 9).view(1, 7)).loss
    loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    expected = step(model.eval())
    base = model.unload()
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    close(step(again.eval()), expected)
