"""Adapters of modules of experts: any shape, rank and scaling, and files in which only the shapes say what is what."""

from __future__ import annotations

import functools
import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Shape, experts_module
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from saved_adapters import BOTH, needs_current_files, read, rewrite, save
from walk import build

pytestmark = needs_current_files


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
