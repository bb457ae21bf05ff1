"""Steps of the whole model with random weights: small sizes of the same structure, by the same code as on a GPU."""

from __future__ import annotations

import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from triton.runtime.jit import JITFunction

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def steps(gpu, registered, attention) -> ModuleType:
    attention.register_attention("scattermoe")
    return gpu("model_step")


def setting(steps: ModuleType, dtype: torch.dtype = torch.float32) -> Any:
    return steps.Setting(batch=2, length=64, steps=2, device="cpu", dtype=dtype)


def test_steps_have_eagers_losses_and_the_results_page_shows_their_figures(
    steps, gpu, monkeypatch, tmp_path, capsys
) -> None:
    path = tmp_path / "benchmarks/results/recipes/tiny.json"
    options = ["--tiny", "--eager", "--layers", "2", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["model_step", *options, "--output", str(path)])
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "benchmarks"), *sys.path])
    steps.main()
    figures = json.loads(path.read_text())
    losses = figures["losses"]
    assert losses["ours"] == pytest.approx(losses["eager"], rel=1e-5)
    assert losses["ours"] == sorted(losses["ours"], reverse=True)
    assert figures["operations"] > figures["operations_once"] > 0
    assert figures["about"] in capsys.readouterr().out
    table = gpu("report").model_table({"a": {"outcome": "passed", **figures}, "b": {"outcome": "cut off"}})
    assert [line.split(" | ")[1] for line in table[2:4]] == ["ours", "eager"]
    assert table[-3:-1] == [f"- a, passed: {figures['about']}", "- b, cut off: no figures"]
    page = importlib.import_module("results_page")
    assert "| gemma4_26b_qlora, 2 layers, 2 x 64 |" in page.render(page.read(tmp_path))[page.PAGE]


def test_the_model_has_every_tensor_of_the_real_one_and_trains_adapters_alone(steps, registered) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(steps.configuration(None, tiny=False))
    assert sum(parameter.numel() for parameter in real.parameters()) == pytest.approx(25.2e9, rel=0.01)
    config = steps.configuration(None, tiny=True)
    model = steps.build(config, "ours", setting(steps), registered)
    base = model.get_base_model()
    names = {name.replace("base_layer.", "") for name, _ in base.named_parameters() if "lora_" not in name}
    assert names == {name for name, _ in real.named_parameters()}
    buffers = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    assert {"model.language_model.rotary_emb.full_attention_inv_freq"} < buffers.keys()
    for name, tensor in base.named_buffers():
        torch.testing.assert_close(tensor, buffers.pop(name))
    assert not buffers
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert base.lm_head.weight is base.model.language_model.embed_tokens.weight
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # Two factors of each of the experts' two weights and of 3 or, where keys are not values, 4 projections.
    assert len(trained) == 2 * (30 * 2 + 25 * 4 + 5 * 3)
    assert all("lora_" in name for name in trained)


def test_kernels_are_compiled_before_the_first_step_and_none_is_launched(
    steps, registered, submodule, monkeypatch
) -> None:
    called: set[str] = set()

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert warmup
        called.add(function.fn.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    config = steps.configuration(2, tiny=True)
    training = steps.Training(
        steps.build(config, "ours", setting(steps, torch.bfloat16), registered), setting(steps)
    )
    monkeypatch.setattr(submodule("ops.dispatch"), "use_triton", lambda x: True)
    # What no kernel has written, as far from an index as can be.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with (
            mock.patch.object(submodule("ops.tile_tables"), "table_of", return_value="sm_90"),
            steps.compiling(registered, ThreadPoolExecutor(1)),
        ):
            training.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for kind in (
        "gate_forward",
        "matmul",
        "outer",
        "attention",
        "rotary",
        "rms",
        "gated",
        "logits",
        "decode",
    ):
        assert any(kind in name for name in called), f"{kind}: {sorted(called)}"


def test_the_stage_returns_the_figures_that_there_are(gpu, monkeypatch, tmp_path) -> None:
    stages = gpu("stages")
    path = tmp_path / "recipes/gemma4_26b_80.json"
    path.parent.mkdir()
    path.write_text('{"ms_per_step": {"ours": 5.0}}')
    monkeypatch.setattr(stages, "built", lambda folder, tiles: folder)
    monkeypatch.setattr(stages, "run_all", lambda jobs, *_: {job.name: "cut off" for job in jobs})
    results = stages.run_model(stages.Run(tmp_path, {}, dict, 2), 0.0)
    assert results == {
        "gemma4_26b_80": {"outcome": "cut off", "ms_per_step": {"ours": 5.0}},
        "gemma4_26b_24": {"outcome": "cut off"},
    }


def test_jobs_of_the_stage_have_options_that_the_program_takes(steps, gpu, monkeypatch, tmp_path) -> None:
    stages = gpu("stages")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for job in stages.model_jobs(stages.Run(tmp_path, {}, dict, 2), Path("build")):
        monkeypatch.setattr(sys, "argv", list(job.command[2:]))
        with pytest.raises(SystemExit, match="finds no GPU"):
            steps.main()
