"""Converted adapters as they are written: whole or not at all, under the names of servers, by the recipe as well."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from saved_adapters import needs_current_files, read

pytestmark = needs_current_files


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
