"""Models trained with weights and gradients in float8: gradients, descent, memory, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import gemma4_models
import pytest
import torch
from allocations import Allocations
from helpers import TRITON, assert_close
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(TRITON, reason="loads models, which the interpreter is too slow for")
Submodule = Callable[[str], ModuleType]
IDS = torch.arange(2 * 40).view(2, 40) * 7 % 61 + 2


def gemma4(dtype: torch.dtype = torch.bfloat16) -> Any:
    model = gemma4_models.build("moe", dtype)
    model.set_experts_implementation("scattermoe")
    return model


def llama(dtype: torch.dtype = torch.bfloat16) -> Any:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def gpt_oss(dtype: torch.dtype = torch.bfloat16) -> Any:
    """Transposed experts with biases."""
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
    model = GptOssForCausalLM(config).to(dtype).train()
    model.set_experts_implementation("scattermoe")
    return model


def dense_copy(model: Any) -> Any:
    """A model of the same numbers, none of them in float8."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if hasattr(parameter, "codes"):
                dense = parameter.detach().dequantize()
                setattr(module, name, torch.nn.Parameter(dense))
    return model


def backward(model: Any) -> dict[str, torch.Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [gemma4, gpt_oss, llama])
def test_gradients_are_those_of_the_decoded_weights_rounded_once(registered: ModuleType, build: Any) -> None:
    model = build(torch.float32)
    registered.train_in_float8(model)
    exact = backward(dense_copy(model))
    got = backward(model)
    assert got.keys() == exact.keys()
    compressed = {name: gradient for name, gradient in got.items() if hasattr(gradient, "codes")}
    assert len(compressed) == sum(hasattr(p, "codes") for p in model.parameters()) >= 10
    for name, gradient in got.items():
        if name not in compressed:
            assert_close([gradient], [exact[name]], 1e-5)
            continue
        reach = exact[name].abs() / 4 + 1e-6 * exact[name].abs().amax()
        assert bool(((gradient.dequantize() - exact[name]).abs() <= reach).all()), name

    # Recomputed layers draw nothing of their own, and accumulate as the others do.
    torch.manual_seed(3)
    again = copy.deepcopy(model)
    for parameter in (*model.parameters(), *again.parameters()):
        parameter.grad = None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    results = []
    for each in (model, again):
        torch.manual_seed(4)
        for _ in range(2):
            gradients = backward(each)
        results.append(gradients)
    for name, gradient in results[0].items():
        assert torch.equal(gradient.dequantize(), results[1][name].dequantize()), name


def descent(model: Any, optimizer: Any, steps: int = 12) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("build", [gemma4, llama])
def test_loss_falls_and_stays_near_that_of_bfloat16(registered: ModuleType, build: Any) -> None:
    torch.manual_seed(1)
    model = build()
    plain = copy.deepcopy(model)
    registered.train_in_float8(model)
    losses = descent(model, registered.Adafactor(model.parameters(), lr=2e-3))
    optimizer = registered.Adafactor(plain.parameters(), lr=2e-3)
    for parameter in plain.parameters():
        if parameter.dim() > 1:
            parameter._post_accumulate_grad_hooks.clear()  # Gradients stay in bfloat16.
    exact = descent(plain, optimizer)
    assert losses[-1] < 0.95 * losses[0]
    assert max(abs(a / b - 1) for a, b in zip(losses, exact, strict=True)) < 0.06


def test_weights_and_gradients_take_two_bytes_a_parameter_and_adafactor_rows_and_columns(
    registered: ModuleType, submodule: Submodule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submodule("ops.float8.rounding"), "_CHUNK_ELEMENTS", 1 << 14)
    matrix, experts = 384 * 512, 3
    sizes = [torch.nn.Linear(384, 512, bias=False), torch.nn.Linear(512, 384, bias=False)]
    model = torch.nn.Sequential(*sizes).to(torch.bfloat16)
    x = torch.randn(4, 384, dtype=torch.bfloat16)
    stack = torch.nn.Parameter(torch.randn(experts, 384, 512, dtype=torch.bfloat16))
    registered.train_in_float8(model)
    weight = submodule("ops.float8.weight").Float8Weight.from_dense(stack, stochastic=False)
    model.register_parameter("stack", torch.nn.Parameter(weight))
    add_gradient = submodule("ops.float8.products").with_weight_gradient
    routing = submodule("ops.routing").Routing(torch.arange(4), torch.tensor([0, 1, 2, 4]))
    optimizer = registered.Adafactor(model.parameters())
    elements, blocks, moments = (2 + experts) * matrix, (2 + experts) * 3 * 4, (2 + experts) * (384 + 512)
    assert sum(p.codes.nbytes + p.scales.nbytes for p in model.parameters()) == elements + 4 * blocks
    with Allocations() as watched:
        for _ in range(2):
            y = model(x)
            add_gradient(y, y.new_ones(4, 512), model.stack, routing, 1).square().sum().backward()
            del y
        held = watched.now()
        peak, watched.peak = watched.peak, 0
        optimizer.step()
    # One byte an element and the scales; with a few activations and numbers.
    assert elements + 4 * blocks <= held <= elements + 4 * blocks + 16384
    assert held + 4 * moments <= watched.now() <= held + 4 * moments + 1024
    # The second gradient of the stack, before it is added, is in float8; one matrix is dense, in float32 at most.
    assert peak <= held + experts * matrix + 8 * matrix + (1 << 19)
    # A weight, its gradient and the squares of this.
    assert watched.peak <= held + 4 * moments + 3 * 4 * matrix + (1 << 19)


def test_adafactor_takes_the_papers_step_and_rounds_it_without_bias(
    registered: ModuleType, submodule: Submodule
) -> None:
    # 512 experts of the same numbers: their mean is the step in float32.
    w, gradients = torch.randn(24, 40), [torch.randn(24, 40) for _ in range(2)]
    kind, gradient_kind = (
        submodule(f"ops.float8.{name.lower()}").__dict__[f"Float8{name}"] for name in ("Weight", "Gradient")
    )
    exact = kind.from_dense(w, stochastic=False).dequantize()
    weight = torch.nn.Parameter(kind.from_dense(exact.expand(512, -1, -1).contiguous(), stochastic=False))
    plain = torch.nn.Parameter(exact.clone())
    settings = {"lr": 0.05, "relative_step": True, "weight_decay": 0.1}
    optimizers = [registered.Adafactor([p], **settings) for p in (weight, plain)]
    rows, columns = torch.zeros(24), torch.zeros(40)
    expected = exact.clone()
    for number, gradient in enumerate(gradients):
        gradient = gradient_kind.from_dense(gradient, stochastic=False).dequantize()
        plain.grad = gradient
        weight.grad = gradient_kind.from_dense(gradient.expand(512, -1, -1).contiguous(), stochastic=False)
        beta = 1 - (number + 1) ** -0.8
        rows = beta * rows + (1 - beta) * gradient.square().mean(1)
        columns = beta * columns + (1 - beta) * gradient.square().mean(0)
        update = gradient / (rows[:, None] * columns / rows.mean()).sqrt()
        update = update / update.square().mean().sqrt().clamp(min=1)
        size = 0.05 * expected.square().mean().sqrt()
        expected = (1 - 0.05 * 0.1) * expected - size * update
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(plain.detach(), expected, rtol=1e-4, atol=1e-5)
        if not number:
            mean = weight.detach().dequantize().mean(0)
            assert bool(((mean - expected).abs() < 5 * expected.abs() / 16 / 512**0.5 + 1e-4).all())


def test_another_optimizer_steps_a_dense_parameter_at_a_time_and_keeps_its_states(
    registered: ModuleType,
) -> None:
    torch.manual_seed(1)
    model = llama()
    plain = copy.deepcopy(model)
    registered.train_in_float8(model)
    optimizer = registered.Float8Optimizer(torch.optim.AdamW, model.parameters(), lr=2e-3, weight_decay=0.0)
    losses = descent(model, optimizer, 6)
    other = registered.Float8Optimizer(torch.optim.AdamW, model.parameters(), lr=9.0, weight_decay=0.0)
    for save, load in (
        (optimizer.state_dict, other.load_state_dict),
        (
            partial(get_optimizer_state_dict, model, optimizer),
            partial(set_optimizer_state_dict, model, other),
        ),
    ):
        load(copy.deepcopy(save()))
        assert {float(state["step"]) for state in other.state_dict()["state"].values()} == {6.0}
    losses += descent(model, other, 6)
    exact = descent(plain, torch.optim.AdamW(plain.parameters(), lr=2e-3, weight_decay=0.0), 12)
    assert losses[-1] < 0.95 * losses[0]
    assert max(abs(a / b - 1) for a, b in zip(losses, exact, strict=True)) < 0.06
    # Filters in another order of memory.
    filters = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    for kind in (registered.Adafactor, partial(registered.Float8Optimizer, torch.optim.AdamW)):
        before, filters.grad = filters.detach().clone(), torch.ones_like(filters)
        kind([filters], lr=1e-2).step()
        assert bool((filters < before).all())
    # Between steps no dense copy is left.
    assert not any(p.numel() for inner in other._optimizers.values() for p in inner.param_groups[0]["params"])


def test_products_in_float8_are_those_of_rounded_activations(
    registered: ModuleType, submodule: Submodule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        submodule("integration.float8_training.convert"), "refuse_without_products", lambda *_: None
    )
    model = torch.nn.Sequential(torch.nn.Linear(144, 160, dtype=torch.bfloat16))
    with torch.no_grad():  # Blocks of other scales.
        model[0].weight[:128] *= 2**-6
    registered.train_in_float8(model, float8_products=True)
    model = copy.deepcopy(model)
    x = torch.randn(3, 7, 144, dtype=torch.bfloat16, requires_grad=True)
    scale = x.detach().abs().amax().float() / 448
    rounded = (x.detach() / scale).to(torch.float8_e4m3fn).float() * scale
    weight = model[0].weight.detach().dequantize(torch.float32)
    exact = rounded @ weight.mT + model[0].bias.float()
    y = model(x)
    assert_close([y.float()], [exact], 2**-7)
    assert not torch.equal(y, torch.nn.functional.linear(x, weight.bfloat16(), model[0].bias))
    y.sum().backward()
    assert_close([x.grad.float()], [weight.sum(0).expand_as(x)], 2**-6)
    assert hasattr(model[0].weight.grad, "codes")


def test_a_model_that_moves_after_its_optimizer_was_made_is_still_trained(registered: ModuleType) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    registered.train_in_float8(model)
    optimizer = registered.Adafactor(model.parameters(), lr=0.1)
    parameter, codes = model[0].weight, model[0].weight.codes
    model._apply(lambda tensor: tensor.clone())  # As to another device.
    assert model[0].weight is parameter is optimizer.param_groups[0]["params"][0]
    assert parameter.codes is not codes
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(parameter.codes, codes)
    exact = parameter.detach().dequantize()
    weight = model.to(torch.bfloat16)[0].weight.detach()
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.dequantize().float(), exact)
    assert model.to("meta")[0].weight.codes.is_meta


def test_the_compiler_takes_linear_layers_in_one_graph_and_follows_their_steps(
    registered: ModuleType,
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 8))
    registered.train_in_float8(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = registered.Adafactor(model.parameters(), lr=1e-2)
    x, losses = torch.randn(3, 24), []
    for _ in range(2):
        y = compiled(x)
        assert torch.equal(y, model(x))
        losses.append(y.square().sum())
        losses[-1].backward()
        assert hasattr(model[0].weight.grad, "codes")
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
