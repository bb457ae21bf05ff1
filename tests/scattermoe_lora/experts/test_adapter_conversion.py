"""Adapters in the layout that servers read: PEFT's own updates of every expert, and PEFT's own bits on the way back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from saved_adapters import BOTH, EXPERTS, LINEARS, MODELS, needs_current_files, read, rewrite, save
from transformers import AutoModelForCausalLM

# Where a server has the experts of a layer, and what it calls gate, up and down.
SERVED = {
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "gemma4": ("experts", "gate_proj", "up_proj", "down_proj"),
    "gpt_oss": ("mlp.experts", "w1", "w3", "w2"),
}
PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"experts.down_proj": 5, "o_proj": 2},
    "alpha_pattern": {"experts.gate_up_proj": 7},
}
Deltas = dict[str, torch.Tensor]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    needs_current_files,
]


def of_peft(base: Path, adapter: Path) -> Deltas:
    """What PEFT itself adds to each weight in float64: gate, up and down of an experts module, and linear layers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    wrapped = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double()
    deltas = {}
    for name, layer in wrapped.named_modules():
        name = name.removeprefix("base_model.model.")
        parameter = getattr(layer, "parameter_name", None)
        if parameter is None:
            if hasattr(layer, "get_delta_weight"):
                deltas[name] = layer.get_delta_weight("default").detach()
            continue
        experts = layer.get_base_layer()
        delta = layer.get_delta_weight("default").detach()
        delta = delta.mT if experts.is_transposed else delta
        name = name.replace(".base_layer", "")
        if parameter == "down_proj":
            deltas[f"{name}.down"] = delta
        else:
            both = delta.unflatten(1, (2, -1) if experts.is_concatenated else (-1, 2))
            deltas[f"{name}.gate"], deltas[f"{name}.up"] = both.unbind(1 if experts.is_concatenated else 2)
    return deltas


def of_server(kind: str, directory: Path) -> Deltas:
    """The same from a file for servers, by what all versions of theirs understand: one rank, one alpha."""
    config, tensors = read(directory)
    rank, scaling = config["r"], config["lora_alpha"] / config["r"]
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["target_parameters"] is None
    # SGLang's conditions for LoRA on experts.
    assert {"gate_proj", "up_proj", "down_proj"} <= set(config["target_modules"])
    place, *names = SERVED[kind]
    deltas: Deltas = {}
    while tensors:
        key = next(k for k in tensors if k.endswith(".lora_A.weight"))
        a, b = tensors.pop(key), tensors.pop(key.replace("lora_A", "lora_B"))
        assert a.shape[0] == b.shape[1] == rank
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = scaling * b.double() @ a.double()
        match = re.fullmatch(rf"(model\.layers\.\d+)\.{place}\.(\d+)\.({'|'.join(names)})", name)
        if match is None:
            assert name.endswith(tuple(LINEARS)), name
            deltas[name] = delta
            continue
        part = ("gate", "up", "down")[names.index(match[3])]
        name = f"{match[1]}.{place.replace('block_sparse_moe', 'mlp')}.{part}"
        deltas.setdefault(name, torch.full((EXPERTS, *delta.shape), torch.nan, dtype=delta.dtype))
        deltas[name][int(match[2])] = delta
    return deltas


def assert_same(got: Deltas, expected: Deltas, tolerance: float = 1e-15) -> None:
    assert expected
    assert expected.keys() <= got.keys()
    for name, delta in got.items():
        if name not in expected:  # Servers want every projection of an expert.
            assert not delta.any(), name
            continue
        assert float((delta - expected[name]).abs().max()) <= tolerance * float(expected[name].abs().max()), (
            name
        )


@pytest.mark.parametrize(
    "config",
    [{}, PATTERNS, {"target_parameters": BOTH[:1]}, {"target_parameters": BOTH[1:]}, {"target_modules": []}],
    ids=["plain", "patterns", "gate_up", "down", "experts alone"],
)
@pytest.mark.parametrize("kind", MODELS)
def test_servers_compute_what_peft_computes(
    kernel: ModuleType, bases: Callable[[str], Path], tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    adapter = save(bases(kind), tmp_path / "adapter", **config)
    kernel.convert_adapter(adapter, tmp_path / "served")
    assert_same(of_server(kind, tmp_path / "served"), of_peft(bases(kind), adapter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_there_and_back_gives_the_same_bits(
    kernel: ModuleType, bases: Callable[[str], Path], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    # Scalings that differ by powers of two, and a rank that is padded on the way.
    patterns = {"rank_pattern": {"experts.down_proj": 6}, "alpha_pattern": {"o_proj": 24}}
    adapter = save(bases(kind), tmp_path / "adapter", dtype, **patterns)
    kernel.convert_adapter(adapter, tmp_path / "served")
    kernel.convert_adapter(tmp_path / "served", tmp_path / "back", layout="peft")
    (before, tensors), (after, returned) = read(adapter), read(tmp_path / "back")
    assert {t.dtype for t in returned.values()} == {dtype}
    assert tensors.keys() == returned.keys()
    ratio = {"o_proj.lora_B": 4, "experts.lora_B": 0.5}
    for key, tensor in tensors.items():
        factor = next((r for name, r in ratio.items() if name in key), 1)
        assert torch.equal(tensor * factor, returned[key]), key
    assert set(after["target_modules"]) == set(before["target_modules"])
    assert set(after["target_parameters"]) == set(before["target_parameters"])
    assert_same(of_peft(bases(kind), tmp_path / "back"), of_peft(bases(kind), adapter), 0)


@pytest.mark.parametrize("kind", MODELS)
def test_a_plain_adapter_comes_back_as_it_was(
    kernel: ModuleType, bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    adapter = save(bases(kind), tmp_path / "adapter")
    kernel.convert_adapter(adapter, tmp_path / "served")
    kernel.convert_adapter(tmp_path / "served", tmp_path / "back", layout="peft")
    (before, tensors), (after, returned) = read(adapter), read(tmp_path / "back")
    assert tensors.keys() == returned.keys()
    assert all(torch.equal(t, returned[key]) for key, t in tensors.items())
    lists = ("target_modules", "target_parameters")
    assert {**after, **{k: sorted(after[k]) for k in lists}} == {
        **before,
        **{k: sorted(before[k]) for k in lists},
    }


@pytest.mark.parametrize("kind", MODELS)
def test_what_servers_read_goes_back_into_peft_with_every_setting(
    kernel: ModuleType, bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    adapter = save(bases(kind), tmp_path / "adapter", **PATTERNS)
    kernel.convert_adapter(adapter, tmp_path / "served")
    kernel.convert_adapter(tmp_path / "served", tmp_path / "back", layout="peft")
    config, tensors = read(tmp_path / "back")
    assert config["rank_pattern"] == {"experts.down_proj": 5, "self_attn.o_proj": 2}
    # Factors that do not bear the ratio of two scalings in their dtype are wider.
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.float64}
    assert_same(of_peft(bases(kind), tmp_path / "back"), of_peft(bases(kind), adapter))


def test_peft_reads_the_adapter_for_servers_too(
    kernel: ModuleType, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    # Of some models PEFT converts adapters that were made when each expert was a module of linear layers.
    adapter = save(bases("qwen3_moe"), tmp_path / "adapter")
    kernel.convert_adapter(adapter, tmp_path / "served")
    assert_same(of_peft(bases("qwen3_moe"), tmp_path / "served"), of_peft(bases("qwen3_moe"), adapter))


@pytest.mark.parametrize("kind", MODELS)
def test_gate_and_up_of_their_own_have_the_sum_of_their_ranks_in_peft(
    kernel: ModuleType, bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    kernel.convert_adapter(save(bases(kind), tmp_path / "adapter"), tmp_path / "served")
    config, tensors = read(tmp_path / "served")
    gate = SERVED[kind][1]
    tensors |= {k: torch.randn_like(t) for k, t in tensors.items() if f".{gate}.lora_A" in k}
    rewrite(tmp_path / "served", config, tensors)
    kernel.convert_adapter(tmp_path / "served", tmp_path / "back", layout="peft")
    assert read(tmp_path / "back")[0]["rank_pattern"] == {BOTH[0]: 6}
    assert_same(of_peft(bases(kind), tmp_path / "back"), of_server(kind, tmp_path / "served"))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_other_parameters_and_saved_modules_come_along(
    kernel: ModuleType, bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    targets = [*BOTH, "gate.weight"]
    adapter = save(bases(kind), tmp_path / "adapter", target_parameters=targets, modules_to_save=["lm_head"])
    kernel.convert_adapter(adapter, tmp_path / "served")
    parent = SERVED[kind][0].partition(".")[0]
    assert f"base_model.model.model.layers.0.{parent}.gate.lora_A.weight" in read(tmp_path / "served")[1]
    kernel.convert_adapter(tmp_path / "served", tmp_path / "back", layout="peft")
    (config, tensors), (_, returned) = read(tmp_path / "back"), read(adapter)
    assert set(config["target_parameters"]) == set(targets)
    assert config["target_modules"] == sorted(LINEARS)
    assert any("lm_head" in key for key in tensors)
    assert tensors.keys() == returned.keys()
    assert all(torch.equal(t, tensors[key]) for key, t in returned.items())


def test_an_adapter_of_some_layers_targets_those_alone(
    kernel: ModuleType, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    config = {
        "target_modules": [f"model.layers.1.self_attn.{x}_proj" for x in "qv"],
        "target_parameters": ["1.mlp.experts.down_proj"],
    }
    adapter = save(bases("qwen3_moe"), tmp_path / "adapter", **config)
    kernel.convert_adapter(adapter, tmp_path / "served")
    kernel.convert_adapter(tmp_path / "served", tmp_path / "back", layout="peft")
    config = read(tmp_path / "back")[0]
    assert config["target_modules"] == [f"model.layers.1.self_attn.{x}_proj" for x in "qv"]
    assert config["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]
    assert_same(of_peft(bases("qwen3_moe"), tmp_path / "back"), of_peft(bases("qwen3_moe"), adapter), 0)
