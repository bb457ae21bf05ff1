"""Adapters in the layout that servers read: PEFT's own updates of every expert, and PEFT's own bits on the way back."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gemma4_models
import peft
import pytest
import torch
import transformers
from helpers import Shape, experts_module
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from walk import build

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24}
EXPERTS = 4
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=24
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS)
    ),
    "gemma4": lambda: gemma4_models.build("moe"),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2)
    ),
}
# Where a server has the experts of a layer, and what it calls gate, up and down.
SERVED = {
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "gemma4": ("experts", "gate_proj", "up_proj", "down_proj"),
    "gpt_oss": ("mlp.experts", "w1", "w3", "w2"),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"experts.down_proj": 5, "o_proj": 2},
    "alpha_pattern": {"experts.gate_up_proj": 7},
}
Deltas = dict[str, torch.Tensor]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    # PEFT before 0.20 takes the other dimension for a parameter's input; that is a test of its own.
    pytest.mark.skipif(Version(peft.__version__) < Version("0.20"), reason="files of PEFT 0.20 and later"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small model of a kind, saved."""
    folder = tmp_path_factory.mktemp("bases")

    def base(kind: str) -> Path:
        if not (folder / kind).exists():
            MODELS[kind]().save_pretrained(folder / kind)
        return folder / kind

    return base


def save(base: Path, directory: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A random adapter of a saved model, as PEFT saves it."""
    defaults = {"r": 3, "lora_alpha": 6, "target_modules": LINEARS, "target_parameters": BOTH}
    lora = LoraConfig(**{**defaults, "init_lora_weights": False, **config})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(directory)
    return directory


def read(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def rewrite(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {k: t.clone().contiguous() for k, t in tensors.items()}, directory / "adapter_model.safetensors"
    )


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


class Layer(torch.nn.Module):
    """A module that holds experts, as PEFT sees a model."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts


def adapted(experts: Any, directory: Path, **config: Any) -> Any:
    """Experts with a random adapter, and the adapter saved."""
    lora = LoraConfig(**{"init_lora_weights": False, "target_parameters": BOTH, **config})
    model = get_peft_model(Layer(experts), lora)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("old", ["0.19.1", None], ids=["0.19", "0.17"])
@pytest.mark.parametrize("intermediate", [24, 32], ids=["I", "I=H"])
def test_an_adapter_of_an_older_peft_has_a_of_the_outputs(
    kernel: ModuleType, tmp_path: Path, old: str | None, intermediate: int
) -> None:
    shape = Shape(tokens=1, experts=4, top_k=2, hidden=32, intermediate=intermediate, rank=3)
    model = adapted(experts_module(shape), tmp_path / "new", r=3)
    config, tensors = read(tmp_path / "new")
    turned = {}
    for key in tensors:
        if "lora_A" in key:
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            turned[key] = b.unflatten(1, (3, 4)).permute(2, 1, 0).flatten(0, 1)
            turned[key.replace("lora_A", "lora_B")] = a.unflatten(0, (4, 3)).permute(2, 1, 0).flatten(1)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    rewrite(tmp_path / "old", {**config, "peft_version": old}, turned)
    for name in ("new", "old"):
        kernel.convert_adapter(
            tmp_path / name, tmp_path / f"{name}_served", model=Layer(experts_module(shape))
        )
    new, turned = read(tmp_path / "new_served")[1], read(tmp_path / "old_served")[1]
    assert new.keys() == turned.keys()
    assert all(torch.equal(t, turned[key]) for key, t in new.items())
    back = tmp_path / "back"
    kernel.convert_adapter(tmp_path / "old_served", back, layout="peft", model=Layer(experts_module(shape)))
    assert all(torch.equal(t, tensors[key]) for key, t in read(back)[1].items())
    assert Version(read(back)[0]["peft_version"]) >= Version("0.20")
    assert model


def test_the_shapes_say_which_parameter_a_wrapper_is_of(
    kernel: ModuleType, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    # PEFT nests the wrappers of a parametrized module in the other order, and writes nowhere which is which.
    adapter = save(bases("gpt_oss"), tmp_path / "adapter")
    kernel.convert_adapter(adapter, tmp_path / "served")
    config, tensors = read(adapter)
    swapped = {
        key.replace(".base_layer", "")
        if ".base_layer" in key
        else key.replace("experts.", "experts.base_layer."): t
        for key, t in tensors.items()
    }
    rewrite(adapter, config, swapped)
    kernel.convert_adapter(adapter, tmp_path / "other")
    expected, got = read(tmp_path / "served")[1], read(tmp_path / "other")[1]
    assert expected.keys() == got.keys()
    assert all(torch.equal(t, got[key]) for key, t in expected.items())


# Interleaved and transposed, concatenated, and without a gate.
CLASSES = {
    "gpt_oss": "GptOssExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "nemotron_h": "NemotronHExperts",
}


@settings(max_examples=25)
@given(
    experts=st.integers(1, 5),
    hidden=st.integers(1, 9),
    intermediate=st.integers(1, 9),
    ranks=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    alphas=st.tuples(st.integers(0, 9), st.integers(1, 9)),
    rslora=st.booleans(),
    kind=st.sampled_from(list(CLASSES)),
    only=st.sampled_from([None, 0, 1]),
)
def test_any_shape_rank_and_scaling(
    kernel: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
    experts: int,
    hidden: int,
    intermediate: int,
    ranks: tuple[int, int],
    alphas: tuple[int, int],
    rslora: bool,
    kind: str,
    only: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    if kind == "gpt_oss":
        # PEFT takes a transposed weight of one expert for that of a plain layer, and fails.
        experts += 1
    module = small(kind, experts, hidden, intermediate)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [f"experts.{up}", "experts.down_proj"]
    model = adapted(
        module,
        folder / "adapter",
        r=ranks[0],
        lora_alpha=alphas[0],
        rank_pattern={names[1]: ranks[1]},
        alpha_pattern={names[1]: alphas[1]},
        use_rslora=rslora,
        target_parameters=names if only is None else [names[only]],
    ).double()
    base = Layer(small(kind, experts, hidden, intermediate))
    kernel.convert_adapter(folder / "adapter", folder / "served", model=base)
    kernel.convert_adapter(folder / "served", folder / "back", layout="peft", model=base)
    again = PeftModel.from_pretrained(
        Layer(small(kind, experts, hidden, intermediate)).double(),
        folder / "back",
        autocast_adapter_dtype=False,
    ).double()
    config, tensors = read(folder / "served")
    got = {w.parameter_name: w.get_delta_weight("default") for w in wrappers(again)}
    expected = {w.parameter_name: w.get_delta_weight("default") for w in wrappers(model)}
    assert got.keys() == expected.keys()
    for name, delta in expected.items():
        close = functools.partial(
            torch.testing.assert_close, rtol=0, atol=1e-14 * float(delta.detach().abs().max())
        )
        close(got[name], delta)
        # Of a single expert PEFT gives a matrix.
        weight = delta.reshape(experts, *delta.shape[-2:])
        weight = weight.mT if module.is_transposed else weight
        parts = {name: weight}
        if name == "gate_up_proj":
            halves = weight.unflatten(1, (2, -1) if module.is_concatenated else (-1, 2))
            gate, up = halves.unbind(1 if module.is_concatenated else 2)
            parts = {"gate_proj": gate, "up_proj": up}
        for part, update in parts.items():
            for expert in range(experts):
                place = f"base_model.model.experts.{expert}.{part}"
                a, b = (tensors[f"{place}.lora_{side}.weight"].double() for side in "AB")
                close(config["lora_alpha"] / config["r"] * b @ a, update[expert])


def small(kind: str, *sizes: int) -> Any:
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    return build(getattr(module, CLASSES[kind]), torch.float32, *sizes)


def wrappers(model: Any) -> Iterator[Any]:
    return (m for m in model.modules() if hasattr(m, "parameter_name"))


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
FIRST = "base_model.model.model.layers.0.mlp.experts"


def removed(key: str) -> Change:
    def remove(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    return remove


def changed(key: str, *shape: int) -> Change:
    return lambda config, tensors: tensors.update({key: torch.ones(shape)})


def with_config(**settings: Any) -> Change:
    return lambda config, tensors: config.update(settings)


def other_expert_rank(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    place = f"{FIRST}.2.up_proj"
    tensors |= {f"{place}.lora_A.weight": torch.ones(2, 32), f"{place}.lora_B.weight": torch.ones(24, 2)}


def renamed(old: str, new: str) -> Change:
    def rename(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if old in k]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return rename


def no_experts(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for key in [k for k in tensors if "experts" in k]:
        del tensors[key]


IN_PEFTS: dict[str, tuple[Change, str, str, str]] = {
    "another method": (with_config(peft_type="LOHA"), "adapter_config.json: peft_type", "LORA", "LOHA"),
    "DoRA": (with_config(use_dora=True), "adapter_config.json: use_dora", "false", "True"),
    "bias": (with_config(lora_bias=True), "adapter_config.json: lora_bias", "false", "True"),
    "magnitude": (
        changed(f"{FIRST}.lora_magnitude_vector", 3),
        f"adapter_model.safetensors: {FIRST}.lora_magnitude_vector",
        "factors A and B of LoRA alone",
        "[3]",
    ),
    "no rank": (with_config(r=None), "adapter_config.json: r", "a rank of 1 or more", "None"),
    "no alpha": (with_config(lora_alpha="x"), "adapter_config.json: lora_alpha", "a number", "x"),
    "another rank": (with_config(r=4), f"adapter_model.safetensors: {FIRST}", "rank 4", "3"),
    "no B": (
        removed(f"{FIRST}.lora_B.weight"),
        f"{FIRST}.lora_B.weight",
        "a factor A and a factor B",
        "none",
    ),
    "A and B of two ranks": (
        changed(f"{FIRST}.lora_B.weight", 32, 8),
        FIRST,
        "A [r, in] and B [out, r]",
        "[32, 8]",
    ),
    "no multiple of the experts": (
        lambda c, t: t.update(
            {f"{FIRST}.lora_A.weight": torch.ones(13, 24), f"{FIRST}.lora_B.weight": torch.ones(32, 13)}
        ),
        f"{FIRST}.lora_A.weight",
        "A [r*4, 32] and B [48, r*4] of gate_up_proj or A [r*4, 24] and B [32, r*4] of down_proj",
        "[13, 24] and [32, 13]",
    ),
    "other widths": (
        changed(f"{FIRST}.lora_A.weight", 12, 25),
        FIRST,
        "A [r*4, 24] and B [32, r*4]",
        "[12, 25]",
    ),
    "one parameter twice": (
        lambda c, t: t.update(
            {f"{FIRST}.base_layer.lora_{s}.weight": t[f"{FIRST}.lora_{s}.weight"] for s in "AB"}
        ),
        FIRST,
        "one pair of factors of down_proj",
        "a second",
    ),
    "no such layer": (renamed("q_proj", "z_proj"), "z_proj", "a module of", "none of that name"),
    "no experts": (no_experts, "adapter_model.safetensors: experts", "modules of", "others alone"),
    "no such base": (
        with_config(base_model_name_or_path="/nowhere/at/all"),
        "adapter_config.json: base_model_name_or_path",
        "a model whose configuration transformers loads",
        "/nowhere/at/all",
    ),
    "no base": (with_config(base_model_name_or_path=None), "base_model_name_or_path", "(or model=)", "None"),
}
IN_SERVERS: dict[str, tuple[Change, str, str, str]] = {
    "missing expert": (
        renamed("experts.2.", "experts.1."),
        f"{FIRST}.2.",
        "factors for each of 4 experts",
        "none",
    ),
    "an expert too many": (renamed("experts.3.", "experts.9."), f"{FIRST}.3.", "factors for each", "none"),
    "the fifth of four": (
        lambda c, t: t.update({k.replace("s.3.", "s.4."): t[k] for k in list(t) if "s.3." in k}),
        f"{FIRST}.4.",
        "experts 0 to 3",
        "4",
    ),
    "another rank": (
        other_expert_rank,
        f"{FIRST}.2.up_proj",
        "the rank of all experts 3",
        "[2, 32] and [24, 2]",
    ),
    "other widths": (
        changed(f"{FIRST}.1.down_proj.lora_A.weight", 3, 25),
        f"{FIRST}.1.down_proj",
        "A [3, 24] and B [32, 3]",
        "[3, 25] and [32, 3]",
    ),
    "another scaling": (
        with_config(alpha_pattern={"experts.1.up_proj": 99}),
        f"{FIRST}.1.up_proj",
        "alpha / r of all experts 2.0",
        "33.0",
    ),
    "another projection": (
        renamed("up_proj", "w9"),
        f"{FIRST}.0.w9",
        "one of the projections gate_proj",
        "w9",
    ),
}


@pytest.fixture(scope="module")
def good(
    bases: Callable[[str], Path], kernel: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An adapter in both layouts, by the layout that it can be converted to."""
    folder = tmp_path_factory.mktemp("good")
    adapter = save(bases("qwen3_moe"), folder / "adapter")
    kernel.convert_adapter(adapter, folder / "served")
    return {"per_expert": adapter, "peft": folder / "served"}


@pytest.mark.parametrize(
    ("layout", "case"),
    [*(("per_expert", case) for case in IN_PEFTS), *(("peft", case) for case in IN_SERVERS)],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    kernel: ModuleType, good: dict[str, Path], tmp_path: Path, layout: str, case: str
) -> None:
    change, where, expected, got = (IN_PEFTS if layout == "per_expert" else IN_SERVERS)[case]
    source = tmp_path / "source"
    shutil.copytree(good[layout], source)
    config, tensors = read(source)
    change(config, tensors)
    rewrite(source, config, tensors)
    with pytest.raises(ValueError, match=r"^convert_adapter: ") as refusal:
        kernel.convert_adapter(source, tmp_path / "out", layout=layout)
    place, _, rest = str(refusal.value).partition(": expected ")
    assert str(source) in place
    assert where in place
    assert expected in rest.partition(", got ")[0]
    assert got in rest.rpartition(", got ")[2]
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("targets", [["gate_up_proj_bias"], ["gate_up_proj", "down_proj", "down_proj_bias"]])
def test_an_adapter_of_biases_is_refused(
    kernel: ModuleType, bases: Callable[[str], Path], tmp_path: Path, targets: list[str]
) -> None:
    targets = [f"experts.{target}" for target in targets]
    adapter = save(bases("gpt_oss"), tmp_path / "adapter", target_parameters=targets)
    message = "adapter_config.json: target_parameters: expected of experts gate_up_proj and down_proj, got "
    with pytest.raises(ValueError, match=message + targets[-1]):
        kernel.convert_adapter(adapter, tmp_path / "out")
    # Whatever its config says.
    config, tensors = read(adapter)
    rewrite(adapter, {**config, "target_parameters": None}, tensors)
    with pytest.raises(
        ValueError, match=r"lora_A.weight: expected A \[r\*4, 32\] and B \[48, r\*4\] of gate_up_proj"
    ):
        kernel.convert_adapter(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [adapter]


@pytest.mark.parametrize("layout", ["per_expert", "peft"])
def test_an_adapter_that_is_in_the_layout_already_is_refused(
    kernel: ModuleType, good: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    source = good["peft" if layout == "per_expert" else "per_expert"]
    with pytest.raises(
        ValueError, match=r"experts: expected factors .* \(or another layout=\), got \d+ pairs"
    ):
        kernel.convert_adapter(source, tmp_path / "out", layout=layout)
    assert not list(tmp_path.iterdir())


def test_what_is_no_adapter_is_refused(kernel: ModuleType, good: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: adapter_config.json: expected .*, got none"):
        kernel.convert_adapter(tmp_path / "nowhere", tmp_path / "out")
    for file, content, message in (
        ("adapter_config.json", "{", "adapter_config.json: contents: expected JSON, got"),
        ("adapter_config.json", "[]", "peft_type: expected LORA"),
        ("adapter_model.safetensors", "not tensors", "header: expected a safetensors file, got"),
    ):
        shutil.copytree(good["per_expert"], tmp_path / "broken", dirs_exist_ok=True)
        (tmp_path / "broken" / file).write_text(content)
        with pytest.raises(ValueError, match=message):
            kernel.convert_adapter(tmp_path / "broken", tmp_path / "out")
    config = json.loads((good["per_expert"] / "adapter_config.json").read_text())
    (tmp_path / "broken/adapter_config.json").write_text(
        json.dumps({**config, "rank_pattern": {"experts.(": 4}})
    )
    with pytest.raises(
        ValueError, match=r"rank_pattern: expected names or regular expressions, got 'experts\.\('"
    ):
        kernel.convert_adapter(tmp_path / "broken", tmp_path / "out")
    (tmp_path / "broken/adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"broken: adapter_model.safetensors: expected .*, got none"):
        kernel.convert_adapter(tmp_path / "broken", tmp_path / "out")
    with pytest.raises(ValueError, match="layout: expected 'per_expert' or 'peft', got 'vllm'"):
        kernel.convert_adapter(good["per_expert"], tmp_path / "out", layout="vllm")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_adapter_can_be_written_into_the_current_directory(
    kernel: ModuleType, good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kernel.convert_adapter(good["per_expert"], ".")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_nothing_is_replaced(kernel: ModuleType, good: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    kernel.convert_adapter(good["per_expert"], tmp_path / "out")
    before = read(tmp_path / "out")[1]
    with pytest.raises(FileExistsError, match="out: expected nothing there or an empty directory"):
        kernel.convert_adapter(good["per_expert"], tmp_path / "out")
    assert read(tmp_path / "out")[1].keys() == before.keys()


def test_a_write_that_fails_leaves_nothing(
    kernel: ModuleType, good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        kernel.convert_adapter(good["per_expert"], tmp_path / "new" / "parents" / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "parent").mkdir()
    with pytest.raises(OSError, match="No space left"):
        kernel.convert_adapter(good["per_expert"], tmp_path / "parent" / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["parent"]


def test_only_what_shares_its_memory_is_copied_to_be_written(
    submodule: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    written: dict[str, torch.Tensor] = {}

    def save(tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        written.update(tensors)
        save_file(tensors, *rest)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    stack = torch.randn(3, 4, 5)
    tensors = {"first": stack[0], "second": stack[1], "again": stack[0], "turned": stack[2].T}
    submodule("integration.experts.adapter_files").write(tmp_path / "out", {}, tensors)
    assert [name for name, tensor in tensors.items() if written[name].data_ptr() != tensor.data_ptr()] == [
        "again",
        "turned",
    ]
    after = read(tmp_path / "out")[1]
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


def test_names_for_servers_are_those_of_checkpoints(submodule: Callable[[str], ModuleType]) -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    names = submodule("integration.experts.adapter_names").SERVED_NAMES
    for kind in [*names, "qwen3_moe", "olmoe", "deepseek_v3", "jamba"]:
        (gate, up, down), parent = names.get(kind, (("gate_proj", "up_proj", "down_proj"), "mlp"))
        mapping = get_checkpoint_conversion_mapping(kind)
        if kind == "gpt_oss":  # Its checkpoints have stacks.
            assert not mapping
            continue
        sources = {
            str(e.target_patterns): [pattern.split(".")[-2] for pattern in e.source_patterns]
            for e in mapping
            if hasattr(e, "operations")
        }
        assert [gate, up] in sources.values()
        assert [down] in sources.values()
        renamings = [e.source_patterns for e in mapping if ".mlp." in e.target_patterns]
        assert ([f".{parent}."] in renamings) == (parent != "mlp")


def test_the_recipe_converts_and_explains_what_it_cannot(
    kernel: ModuleType, good: dict[str, Path], tmp_path: Path
) -> None:
    # LOCAL_KERNELS, which the kernel's fixture sets, has the script load what was built.
    script = Path(__file__).resolve().parents[3] / "recipes/convert_adapter.py"
    assert len(script.read_text().splitlines()) <= 80
    command = [sys.executable, str(script), str(good["per_expert"]), str(tmp_path / "out")]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    expected, got = read(good["peft"])[1], read(tmp_path / "out")[1]
    assert all(torch.equal(t, got[key]) for key, t in expected.items())
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "Traceback" not in second.stderr
    assert second.stderr.splitlines()[-1].endswith("expected nothing there or an empty directory")
