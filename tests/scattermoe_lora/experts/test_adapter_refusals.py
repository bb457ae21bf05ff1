"""Adapters that cannot be converted: one message that says what, where and what was expected, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from saved_adapters import needs_current_files, read, rewrite, save

pytestmark = needs_current_files


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
