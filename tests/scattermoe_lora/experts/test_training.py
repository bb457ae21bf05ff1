"""The set-ups in which experts with LoRA are trained: checkpointing, compilation, processes, full fine-tuning."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from helpers import AWKWARD, assert_close, low_rank, route
from packaging.version import Version
from peft import LoraConfig, inject_adapter_in_model
from torch._dynamo.backends.debugging import aot_eager
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from walk import EXPERTS, HIDDEN, TOP_K, build, experts_classes

LORA = LoraConfig(
    r=3,
    lora_alpha=6,
    init_lora_weights=False,
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)


def model() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    )
    adapted = inject_adapter_in_model(LORA, AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    adapted.set_experts_implementation("scattermoe")
    return adapted.train()


def loss_and_gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    ids = torch.arange(26).view(2, 13) % 64
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == sum("lora_" in name for name, _ in model.named_parameters())
    return [loss.detach(), *gradients.values()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(registered: ModuleType, reentrant: bool) -> None:
    m = model()
    exact = loss_and_gradients(m)
    m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    m.enable_input_require_grads()
    calls = []
    experts = next(module for module in m.modules() if hasattr(module, "has_gate"))
    experts.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    got = loss_and_gradients(m)
    assert len(calls) == 2  # once in forward, once again in backward
    assert all(torch.equal(g, e) for g, e in zip(got, exact, strict=True))


class Layer(torch.nn.Module):
    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.experts(*arguments)


CLASSES = experts_classes()


def adapted_layer(name: str) -> Layer:
    base = build(CLASSES[name], torch.float32)
    base.config = SimpleNamespace(_experts_implementation="scattermoe")
    weights = [key for key, parameter in base.named_parameters() if parameter.dim() == 3]
    config = LoraConfig(r=3, init_lora_weights=False, target_parameters=[f"experts.{key}" for key in weights])
    return inject_adapter_in_model(config, Layer(base))


def layer_inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
    return torch.randn(tokens, HIDDEN, requires_grad=True), index, torch.rand(tokens, TOP_K)


def assert_compiled_agrees(compiled: Any, layer: Layer, tokens: int) -> None:
    arguments = layer_inputs(tokens)
    leaves = [arguments[0], *(p for p in layer.parameters() if p.requires_grad)]
    results = []
    for run in (compiled, layer):
        out = run(*arguments)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts"])
def test_one_graph_serves_every_batch_size(registered: ModuleType, name: str) -> None:
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    layer = adapted_layer(name)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counting)
    assert_compiled_agrees(compiled, layer, tokens=5)
    first = len(graphs)
    for tokens in (9, 17, 64):
        assert_compiled_agrees(compiled, layer, tokens)
    assert len(graphs) == first
    called = {str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"}
    fused = name in ("Qwen3MoeExperts", "GptOssExperts")
    assert any("experts_forward" in target for target in called) == fused


def test_the_default_backend_compiles_it(
    registered: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The user's own cache may hold code for another processor's vectors, which inductor does not tell apart.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # To find out which instructions the compiler and the processor have takes longer than all else.
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)
    torch._dynamo.reset()
    layer = adapted_layer("Qwen3MoeExperts")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        assert_compiled_agrees(compiled, layer, tokens)


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"), reason="PEFT before 0.20 fails on a bias in its own path"
)
def test_pefts_own_path_compiles(registered: ModuleType) -> None:
    torch._dynamo.reset()
    config = LoraConfig(r=3, init_lora_weights=False, target_parameters=["experts.down_proj_bias"])
    base = build(CLASSES["GptOssExperts"], torch.float32)
    base.config = SimpleNamespace(_experts_implementation="scattermoe")
    layer = inject_adapter_in_model(config, Layer(base))
    with pytest.warns(UserWarning, match="down_proj_bias is none of the weights"):
        assert_compiled_agrees(torch.compile(layer, backend="aot_eager"), layer, tokens=5)


class Dequantized(torch.nn.Module):
    """An experts' weight in bitsandbytes' form: a small parameter, and the weight computed at each reading."""

    def __init__(self) -> None:
        super().__init__()
        self.readings: list[weakref.ref[torch.Tensor]] = []

    def forward(self, small: torch.Tensor) -> torch.Tensor:
        weight = small.float() / 64
        self.readings.append(weakref.ref(weight))
        return weight


def test_quantized_experts_train_and_are_computed_twice_a_forward(registered: ModuleType) -> None:
    plain = build(CLASSES["Qwen3MoeExperts"], torch.float32)
    plain.config = SimpleNamespace(_experts_implementation="scattermoe")
    quantized = copy.deepcopy(plain)
    computed = {}
    for key in ("gate_up_proj", "down_proj"):
        small = (getattr(plain, key).detach() * 64).round().to(torch.int8)
        setattr(plain, key, torch.nn.Parameter(small.float() / 64, requires_grad=False))
        setattr(quantized, key, torch.nn.Parameter(small, requires_grad=False))
        computed[key] = Dequantized()
        torch.nn.utils.parametrize.register_parametrization(quantized, key, computed[key], unsafe=True)
    layers = [inject_adapter_in_model(LORA, Layer(experts)) for experts in (plain, quantized)]
    # PEFT nests the wrappers in another order around parameters of the one kind than of the other.
    wrappers = [
        {m.parameter_name: m for m in each.modules() if hasattr(m, "parameter_name")} for each in layers
    ]
    for key, wrapper in wrappers[1].items():
        wrapper.lora_A.load_state_dict(wrappers[0][key].lora_A.state_dict())
        wrapper.lora_B.load_state_dict(wrappers[0][key].lora_B.state_dict())
        computed[key].readings.clear()
    held = []
    base = layers[1].experts.get_base_layer()
    base.register_forward_pre_hook(
        lambda *_: held.extend(r() for weight in computed.values() for r in weight.readings)
    )
    arguments, results = layer_inputs(tokens=5), []
    for layer, each in zip(layers, wrappers, strict=True):
        out = layer(*arguments)
        factors = [
            getattr(each[key], name)["default"].weight for key in computed for name in ("lora_A", "lora_B")
        ]
        results.append([out, *torch.autograd.grad(out.sin().sum(), [arguments[0], *factors])])
    assert_close(results[1], results[0], 1e-6)
    assert [len(weight.readings) for weight in computed.values()] == [2, 2]
    assert held == [None, None]


def operator_arguments(
    kernel: Any, submodule: Any, biased: bool, transposed: bool
) -> dict[str, tuple[Any, ...]]:
    """For each operator, arguments that it accepts."""
    shape = AWKWARD[1]
    e, h, i = shape.experts, shape.hidden, shape.intermediate

    def weight(n_out: int, n_in: int) -> torch.Tensor:
        made = torch.randn(e, n_in, n_out) if transposed else torch.randn(e, n_out, n_in)
        made.requires_grad_()
        return made.mT if transposed else made

    x = torch.randn(shape.tokens, h, requires_grad=True)
    weights = torch.rand(shape.tokens, shape.top_k, requires_grad=True)
    a1, b1 = (t.requires_grad_() for t in low_rank(e, 2 * i, h, 3))
    a2, b2 = (t.requires_grad_() for t in low_rank(e, h, i, 2))
    bias1 = torch.randn(e, 2 * i, requires_grad=True) if biased else None
    bias2 = torch.randn(e, h, requires_grad=True) if biased else None
    order, offsets = submodule("ops.routing").sort_by_expert(route(shape), e)
    gate = submodule("ops.activation").Gate("silu", biased, 1.5, 2.0, 1.0)
    linear, experts = submodule("ops.grouped_linear.op"), submodule("ops.experts.op")

    tensors = (x, weight(2 * i, h), a1, b1, bias1, order, offsets)
    single = (*tensors, shape.top_k, False)
    y, low = linear.grouped_linear_forward(*single)
    layer = (x, tensors[1], weight(h, i), weights, a1, b1, a2, b2, bias1, bias2, order, offsets)
    out, *kept = experts.experts_forward(*layer, *gate, False, True)

    def plain(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)

    return {
        "grouped_linear_forward": single,
        "grouped_linear_backward": plain(
            (torch.randn_like(y), *tensors, low, shape.top_k, [True] * 4 + [biased])
        ),
        "experts_forward": (*layer, *gate, False, True),
        "experts_backward": plain((torch.randn_like(out), *layer, *kept, *gate, [True] * 8 + [biased] * 2)),
    }


@pytest.mark.parametrize("layout", ["plain", "gpt-oss"])
def test_every_operator_passes_opcheck(kernel: ModuleType, submodule: Any, layout: str) -> None:
    biased = transposed = layout == "gpt-oss"
    modules = (submodule("ops.grouped_linear.op"), submodule("ops.experts.op"))
    for name, arguments in operator_arguments(kernel, submodule, biased, transposed).items():
        operator = next(getattr(module, name) for module in modules if hasattr(module, name))
        torch.library.opcheck(operator, arguments)


def test_full_fine_tuning_descends_like_eager(registered: ModuleType) -> None:
    losses = []
    for implementation in ("scattermoe", "eager"):
        torch.manual_seed(0)
        m = AutoModelForCausalLM.from_config(model().config, dtype=torch.float32)
        m.set_experts_implementation(implementation)
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        ids = torch.arange(26).view(2, 13) % 64
        for _ in range(4):
            loss = m(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert_close(losses[:1], losses[1:], 1e-4)


def test_two_processes_train_as_one(kernel: ModuleType, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "two_processes.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=1200
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-5000:]
    for check in ("ddp", "fsdp", "expert_parallel", "quantized", "loss", "float8"):
        assert finished.stdout.count(f"{check}: equal to one process") == 2
