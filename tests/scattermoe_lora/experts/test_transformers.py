"""Registration in transformers, and real models that run with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import AWKWARD, assert_close, experts_module, route
from transformers import AutoModelForCausalLM, Gemma4TextConfig, MixtralConfig, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "gemma4": lambda: Gemma4TextConfig(
        **SMALL,
        global_head_dim=16,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=64,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}


def model(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)


def loss_and_gradients(model: Any, implementation: str) -> list[torch.Tensor]:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = torch.arange(26).view(2, 13) % 64
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_has_the_loss_and_gradients_of_eager(registered: ModuleType, name: str) -> None:
    m = model(name)
    assert_close(loss_and_gradients(m, "scattermoe"), loss_and_gradients(m, "eager"), 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_gives_the_tokens_of_eager(registered: ModuleType, name: str) -> None:
    m, ids = model(name).eval(), torch.arange(7).view(1, 7)
    tokens = []
    for implementation in ("scattermoe", "eager"):
        m.set_experts_implementation(implementation)
        tokens.append(m.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert torch.equal(*tokens)


def test_a_gate_of_the_modules_own_runs(kernel: ModuleType) -> None:
    module = experts_module(AWKWARD[1])

    class Doubled(type(module)):  # type: ignore[misc]
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.tanh(gate) * (up + 1)

    module.__class__ = Doubled
    x, index = torch.randn(7, 33, requires_grad=True), route(AWKWARD[1], sentinels=True)
    weights = torch.rand(7, 3, requires_grad=True)
    leaves = (x, weights, module.gate_up_proj, module.down_proj)
    out = kernel.experts_forward(module, x, index, weights)
    got = [out, *torch.autograd.grad(out.square().sum(), leaves)]

    def expert(e: int) -> torch.Tensor:
        hidden = module._apply_gate(x @ module.gate_up_proj[e].t()) @ module.down_proj[e].t()
        return hidden * ((index == e) * weights).sum(dim=1, keepdim=True)

    out = sum((expert(e) for e in range(5)), torch.zeros_like(x))
    assert_close(got, [out, *torch.autograd.grad(out.square().sum(), leaves)], 1e-4)


def test_an_activation_derived_from_a_known_one_runs_as_it_is(kernel: ModuleType) -> None:
    class Doubled(torch.nn.SiLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    module = experts_module(AWKWARD[1])
    module.act_fn = Doubled()
    arguments = torch.randn(7, 33), route(AWKWARD[1]), torch.rand(7, 3)
    assert_close([kernel.experts_forward(module, *arguments)], [module(*arguments)], 1e-5)


def test_autocast_keeps_the_dtype_of_the_hidden_states(kernel: ModuleType) -> None:
    module = experts_module(AWKWARD[1], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kernel.experts_forward(module, torch.randn(7, 33), route(AWKWARD[1]), torch.rand(7, 3))
    assert out.dtype == torch.float32


def test_a_module_without_the_parameters_of_its_layout_is_named(kernel: ModuleType) -> None:
    module = experts_module(AWKWARD[1])
    module.has_bias = True
    message = (
        r"Gemma4TextExperts: expected a parameter gate_up_proj_bias by its layout .*has_bias=True.*, got none"
    )
    with pytest.raises(NotImplementedError, match=message):
        kernel.experts_forward(module, torch.randn(7, 33), route(AWKWARD[1]), torch.rand(7, 3))


@pytest.mark.parametrize(
    ("name", "parameter", "error", "message"),
    [
        (
            "down_proj",
            torch.zeros(5, 33, 16),
            ValueError,
            r"down_proj: expected shape \[E, H, I\] \(5, 33, 20\), got \(5",
        ),
        ("down_proj", torch.zeros(6, 33, 20), ValueError, r"\(5, 33, 20\), got \(6, 33, 20\)"),
        ("down_proj", torch.zeros(5, 40, 20), ValueError, r"\(5, 33, 20\), got \(5, 40, 20\)"),
        (
            "gate_up_proj",
            torch.zeros(5, 40, 33, dtype=torch.float8_e4m3fn),
            NotImplementedError,
            "got torch.float8",
        ),
    ],
)
def test_weights_that_do_not_fit_each_other_are_refused(
    kernel: ModuleType, name: str, parameter: torch.Tensor, error: type[Exception], message: str
) -> None:
    module = experts_module(AWKWARD[1])
    setattr(module, name, torch.nn.Parameter(parameter, requires_grad=False))
    with pytest.raises(error, match=message):
        kernel.experts_forward(module, torch.randn(7, 33), route(AWKWARD[1]), torch.rand(7, 3))


HIDDEN, INDEX, WEIGHTS = torch.zeros(7, 33), torch.zeros(7, 3, dtype=torch.long), torch.ones(7, 3)
A, B = torch.zeros(5, 2, 33), torch.zeros(5, 40, 2)


@pytest.mark.parametrize(
    ("arguments", "lora", "message"),
    [
        ((HIDDEN[:, :32], INDEX, WEIGHTS), {}, "hidden_states: expected shape (7, 33), got (7, 32)"),
        ((HIDDEN[:6], INDEX, WEIGHTS), {}, "hidden_states: expected shape (7, 33), got (6, 33)"),
        ((HIDDEN[None], INDEX, WEIGHTS), {}, "hidden_states: expected shape (7, 33), got (1, 7, 33)"),
        ((HIDDEN.long(), INDEX, WEIGHTS), {}, "hidden_states: expected a floating dtype, got torch.int64"),
        (
            (HIDDEN.to("meta"), INDEX, WEIGHTS),
            {},
            "hidden_states: expected device of the weights, cpu, got meta",
        ),
        (
            (HIDDEN, INDEX.float(), WEIGHTS),
            {},
            "top_k_index: expected [T, K] of int32 or int64, got [7, 3] of",
        ),
        ((HIDDEN, INDEX[:, 0], WEIGHTS), {}, "top_k_index: expected [T, K] of int32 or int64, got [7]"),
        ((HIDDEN, INDEX - 1, WEIGHTS), {}, "expert_index: expected values >= 0, got 21 negative ones"),
        (
            (HIDDEN, INDEX + 6, WEIGHTS),
            {},
            "expert_index: expected values < 5 (the number of experts), got 21",
        ),
        ((HIDDEN, INDEX, WEIGHTS[:, :2]), {}, "top_k_weights: expected shape (7, 3), got (7, 2)"),
        ((HIDDEN, INDEX, WEIGHTS.long()), {}, "top_k_weights: expected a floating dtype, got torch.int64"),
        (
            (HIDDEN, INDEX, WEIGHTS),
            {"up_proj": (A, B)},
            "lora: expected keys among ['down_proj', 'gate_up_proj']",
        ),
        ((HIDDEN, INDEX, WEIGHTS), {"gate_up_proj": (A[:, :0], B)}, "expected [E, r, N_in] with r >= 1"),
        (
            (HIDDEN, INDEX, WEIGHTS),
            {"gate_up_proj": (A[:4], B)},
            "[0]: expected shape (5, 2, 33), got (4, 2, 33)",
        ),
        ((HIDDEN, INDEX, WEIGHTS), {"gate_up_proj": (A, B[..., :1])}, "[1]: expected shape (5, 40, 2), got"),
        ((HIDDEN, INDEX, WEIGHTS), {"gate_up_proj": (A, B.double())}, "[1]: expected dtype of the weight,"),
    ],
)
def test_bad_input_names_argument_expected_and_got(kernel, arguments, lora, message) -> None:
    module = experts_module(AWKWARD[1])
    module._is_expert_parallel = False
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.experts_forward(module, *arguments, lora=lora)


def test_strided_and_expanded_inputs_are_handled(kernel: ModuleType) -> None:
    module = experts_module(AWKWARD[1])
    x = torch.randn(33, 7).t()
    index = torch.tensor([[2], [4], [1]]).expand(3, 7).t()  # one expert's row for all tokens, stride 0
    weights = torch.rand(1, 3).expand(7, 3)
    expected = kernel.experts_forward(module, x.contiguous(), index.contiguous(), weights.contiguous())
    assert torch.equal(kernel.experts_forward(module, x, index, weights), expected)
    module.gate_up_proj = torch.nn.Parameter(torch.randn(33, 40).t().expand(5, 40, 33), requires_grad=False)
    module.down_proj = torch.nn.Parameter(torch.randn(20, 5, 33).permute(1, 2, 0), requires_grad=False)
    strided = kernel.experts_forward(module, x, index, weights)
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, torch.nn.Parameter(getattr(module, name).contiguous(), requires_grad=False))
    assert_close([strided], [kernel.experts_forward(module, x, index, weights)], 1e-6)


def test_inf_passes_through_as_in_eager(kernel: ModuleType) -> None:
    module = experts_module(AWKWARD[1])
    x, index, weights = torch.randn(7, 33), route(AWKWARD[1]), torch.rand(7, 3)
    x[2, 5] = float("inf")
    eager, ours = module(x, index, weights), kernel.experts_forward(module, x, index, weights)
    assert torch.equal(ours.isfinite(), eager.isfinite())


def test_register_and_unregister_are_idempotent_and_complete(kernel: ModuleType) -> None:
    from peft.tuners.lora.layer import ParamWrapper

    before = dict(ALL_EXPERTS_FUNCTIONS), ParamWrapper.forward
    kernel.register()
    kernel.register()
    kernel.register("another")
    assert ALL_EXPERTS_FUNCTIONS["scattermoe"] is ALL_EXPERTS_FUNCTIONS["another"] is kernel.experts_forward
    kernel.unregister()
    kernel.unregister()
    assert (dict(ALL_EXPERTS_FUNCTIONS), ParamWrapper.forward) == before
    kernel.register()
    assert ALL_EXPERTS_FUNCTIONS["scattermoe"] is kernel.experts_forward
    kernel.unregister()


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_a_name_that_is_taken_is_refused(kernel: ModuleType, name: str) -> None:
    with pytest.raises(ValueError, match=f"already has an experts implementation '{name}'"):
        kernel.register(name)


# Loads the kernel in processes split off after the import of torch, each without a package; prints their statuses.
IMPORTS = """
import json, os, sys, traceback
from pathlib import Path
import torch
from kernels import get_local_kernel

def load(absent):
    if absent != "nothing":
        sys.modules[absent] = None
    kernel = get_local_kernel(Path(sys.argv[1]))
    # It would take longer than all the rest of the import.
    assert not {"torch._dynamo", "torch._inductor", "triton", "transformers", "peft"} & set(sys.modules) - {absent}
    print(kernel.grouped_linear(torch.ones(1, 2), torch.ones(1, 3, 2), torch.zeros(1, 1, dtype=torch.long)))
    if absent == "peft":
        kernel.register()

statuses = {}
for absent in sys.argv[2:]:
    process = os.fork()
    if not process:
        try:
            load(absent)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    statuses[absent] = os.waitpid(process, 0)[1]
print(json.dumps(statuses))
"""
ABSENT = ("transformers", "peft", "triton", "nothing")


@pytest.fixture(scope="module")
def imports(kernel: ModuleType) -> dict[str, int]:
    """By the package that was absent, the status of a process that loads the kernel."""
    command = [sys.executable, "-c", IMPORTS, kernel.__file__.rsplit("/", 1)[0], *ABSENT]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("absent", ABSENT)
def test_the_package_imports_without_it_and_imports_no_compiler(imports: dict[str, int], absent: str) -> None:
    assert imports[absent] == 0
