"""Weights that bitsandbytes quantized: decoded and encoded to its bits, and trained as they are."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from bits import DTYPES, same_bits
from bitsandbytes import functional
from bitsandbytes.nn import parametrize
from helpers import assert_close, experts_module
from quantized_models import (
    IDS,
    adapted,
    assert_same_bits,
    build,
    gemma4,
    load,
    logits,
    qwen3,
    save_dense,
    stacks,
    step,
)
from quantized_modules import SHAPE, WEIGHTS, assert_computes_as_dense
from transformers import BitsAndBytesConfig


# Blocks that end with a row, that run over rows and experts, and a last one that is smaller.
@pytest.mark.parametrize("shape", [(2, 64, 64), (4, 6, 32), (3, 5, 22), (2, 3, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_four_bits_are_bitsandbytes_own(
    quantization: Any, shape: tuple[int, ...], dtype: torch.dtype, format: str, monkeypatch: Any
) -> None:
    encode = quantization("encode")
    monkeypatch.setattr(encode, "_CHUNK_ELEMENTS", 128)
    weight = torch.randn(shape).to(dtype)
    weight[0, 0, :8] = 0
    weight[-1] *= 1e-3
    weight[-1, -1] = 0
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=format)
    stack = encode.quantize(weight, format).check("weight")
    assert torch.equal(stack.codes.view(-1), codes.view(-1))
    assert torch.equal(stack.scales[0], state.absmax)
    assert (stack.shape, stack.dtype) == (weight.shape, dtype)


@pytest.mark.parametrize("shape", [(3, 64, 128), (4, 70, 66), (1, 5, 2), (3, 33, 704)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_decodes_the_same_bits(quantization, decoded, kind, nested, shape) -> None:
    for block in (32, 64, 256, 4096):
        # With AVX-512, bitsandbytes takes the scale of another block where a block does not end with a row: its results
        # for one block in a row are those that it gives on a GPU.
        for dtype in DTYPES:
            weight = (torch.randn(shape) * torch.rand(shape[0], shape[1], 1).exp()).to(dtype)
            codes, state = functional.quantize_4bit(
                weight, blocksize=block, quant_type=kind, compress_statistics=nested
            )
            stack = quantization("bitsandbytes").read_quant_state(codes, state, "gate_up_proj")
            assert (stack.shape, stack.dtype) == (weight.shape, dtype)
            expected = by_block(codes, state, weight.numel()).view(shape)
            assert same_bits(decoded(stack), expected)


def by_block(codes: torch.Tensor, state: Any, size: int) -> torch.Tensor:
    """What bitsandbytes decodes, given a block as a row; those that it cannot take so are given whole."""
    if size % state.blocksize:
        columns, state.shape = state.shape, torch.Size((1, size))
    else:
        columns, state.shape = state.shape, torch.Size((size // state.blocksize, state.blocksize))
    dense = functional.dequantize_4bit(codes, state)
    state.shape = columns
    return dense.reshape(-1)[:size]


def quantized(**changes: Any) -> tuple[torch.Tensor, Any]:
    """Codes of a ``[2, 32, 64]`` in nested NF4, and its state but for ``changes`` (``...``: left out)."""
    codes, state = functional.quantize_4bit(
        torch.randn(2, 32, 64), quant_type="nf4", compress_statistics=True
    )
    values = {name: getattr(state, name) for name in vars(state)} | changes
    return codes, SimpleNamespace(**{name: value for name, value in values.items() if value is not Ellipsis})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"absmax": ...}, ValueError, r"up: expected the QuantState .*, got SimpleNamespace without absmax"),
        ({"absmax": None}, ValueError, r"up: expected tensors for its scales, got a QuantState without some"),
        ({"quant_type": "int4"}, NotImplementedError, r"up: expected bitsandbytes' nf4 or fp4, got 'int4'"),
        ({"blocksize": 48}, ValueError, r"up: expected a block size among 32, 64, .*, got 48"),
        ({"blocksize": 128}, ValueError, r"up: expected scales, one for 128 elements, of shape \[32\], got \[64\]"),
        ({"shape": torch.Size((2, 32))}, ValueError, r"up: expected a shape \[E, n, k\] with an even k, got \[2, 32\]"),
        ({"shape": torch.Size((2, 32, 33))}, ValueError, r"with an even k, got \[2, 32, 33\]"),
        (
            {"shape": torch.Size((2, 32, 66))},
            ValueError,
            r"up: expected 2112 bytes of codes for a shape of \[2, 32, 66\], got 2048",
        ),
        ({"absmax": torch.ones(64)}, ValueError, r"up: expected dtype of its scales torch.uint8, got torch.float32"),
        ({"state2": None}, ValueError, r"up: expected dtype of its scales torch.float32, got torch.uint8"),
        ({"offset": torch.ones(2)}, ValueError, r"up: expected offset of its scales, of shape \[\], got \[2\]"),
        ({"code": torch.arange(16.0)}, NotImplementedError, r"up: expected the 16 values of .* nf4, got others"),
    ],
)  # fmt: skip
def test_bitsandbytes_state_that_does_not_fit_is_refused_by_name(
    quantization, changes, kind, message
) -> None:
    read = quantization("bitsandbytes").read_quant_state
    read(*quantized(), "up").refuse_nan("up")
    with pytest.raises(kind, match=message):
        read(*quantized(**changes), "up")


def test_another_parametrization_beside_it_is_refused_and_others_are_not_its(quantization) -> None:
    read = quantization("bitsandbytes").read_parametrized
    module = torch.nn.Module()
    module.up, module.down = (torch.nn.Parameter(torch.randn(3, 32, 64)) for _ in range(2))
    torch.nn.utils.parametrize.register_parametrization(module, "down", torch.nn.Tanh())
    assert read(module, "down") is None
    parametrize.replace_parameter_4bit(module, "up")
    torch.nn.utils.parametrize.register_parametrization(module, "up", torch.nn.Tanh(), unsafe=True)
    with pytest.raises(
        NotImplementedError, match=r"up: expected no parametrization beside bitsandbytes', got Tanh"
    ):
        read(module, "up")


def test_a_parametrized_parameter_is_read_without_evaluating_it(quantization, decoded, monkeypatch) -> None:
    read = quantization("bitsandbytes").read_parametrized
    module = torch.nn.Module()
    module.up = torch.nn.Parameter(torch.randn(3, 32, 64, dtype=torch.bfloat16))
    assert read(module, "up") is None
    parametrize.replace_parameter_4bit(module, "up", compress_statistics=True)
    dense = module.up
    monkeypatch.setattr(parametrize.Bnb4bitParametrization, "forward", None)
    assert same_bits(decoded(read(module, "up")), dense)


@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("fp4", True)])
def test_parametrized_experts_compute_what_the_dense_ones_do(
    registered: ModuleType, submodule: Any, monkeypatch: pytest.MonkeyPatch, kind: str, nested: bool
) -> None:
    module = experts_module(SHAPE)
    for name in WEIGHTS:
        parametrize.replace_parameter_4bit(module, name, compress_statistics=nested, quant_type=kind)
    monkeypatch.setattr(parametrize.Bnb4bitParametrization, "forward", lambda *_: 1 / 0)
    assert_computes_as_dense(registered, submodule, module)


def test_linear_layers_are_another_quantizers(registered: ModuleType, tmp_path: Path) -> None:
    # On a CPU with AVX-512, bitsandbytes multiplies no rows shorter than its blocks.
    _, folder = save_dense(qwen3(hidden_size=64, head_dim=64), tmp_path)
    linears = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantization = registered.quantization_config("fp8", linears=linears)
    model = load(folder, quantization_config=quantization, experts_implementation="scattermoe")
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized", experts_implementation="scattermoe")
    for each in (model, again):
        assert isinstance(each.model.layers[0].self_attn.q_proj, bitsandbytes.nn.Linear4bit)
        assert type(each.model.layers[0].mlp.gate.weight) is torch.nn.Parameter
        assert len(stacks(each)) == 4
    assert_same_bits(stacks(again), stacks(model))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    # bitsandbytes repacks its layers at the first inference on a CPU, and trains none of those.
    both = load(tmp_path / "quantized", experts_implementation="scattermoe").train()
    both = adapted(both, target_modules=["q_proj"])
    assert len(step(both)) == 1 + 2 * (4 + 2)


def test_experts_that_bitsandbytes_parametrized_are_never_evaluated(
    registered: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    # Not copied, for copies share the class that torch made, and with it what is parametrized.
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build(gemma4()))
        targets = []
        for path, module in models[-1].named_modules():
            if hasattr(module, "has_gate"):
                for name in ("gate_up_proj", "down_proj"):
                    parametrize.replace_parameter_4bit(module, name, compress_statistics=True)
                    targets.append(f"{path}.{name}")
    registered.dequantize_experts(models[1])
    models[1].set_experts_implementation("eager")
    model, dense = (adapted(each, target_parameters=targets) for each in models)
    # PEFT nests the wrappers around parametrized weights in another order.
    wrappers, others = (
        {
            (path.partition(".experts")[0], m.parameter_name): m
            for path, m in each.named_modules()
            if hasattr(m, "parameter_name")
        }
        for each in (model, dense)
    )
    for key, wrapper in wrappers.items():
        for factor in ("lora_A", "lora_B"):
            getattr(others[key], factor).load_state_dict(getattr(wrapper, factor).state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(parametrize.Bnb4bitParametrization, "forward", lambda *_: 1 / 0)
        loss = step(model)[0]
    assert_close([loss], [step(dense)[0]], 1e-5)
    for key, wrapper in wrappers.items():
        got, exact = (w.lora_A["default"].weight.grad for w in (wrapper, others[key]))
        assert_close([got], [exact], 2e-4)
    active = logits(model)
    with pytest.warns(UserWarning, match="makes them dense"):
        model.merge_adapter()
    assert_close([logits(model)], [active], 2e-5)
