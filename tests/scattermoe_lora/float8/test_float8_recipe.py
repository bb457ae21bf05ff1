"""The recipe of full fine-tuning in float8, run as a user runs it, at tiny size."""

from __future__ import annotations

import gc
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import TRITON
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(TRITON, reason="loads models, which the interpreter is too slow for")
RECIPES = Path(__file__).parents[3] / "recipes"


def test_the_recipe_trains_near_eager_mode_and_saves_float8(
    registered: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "LOCAL_KERNELS" in os.environ
    losses = []
    for arguments in ([], ["--eager"]):
        folder = tmp_path / "-".join(["out", *arguments])
        command = ["full_float8.py", "--tiny", "--steps", "6", "--output", str(folder), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        result = runpy.run_path(str(RECIPES / "full_float8.py"), run_name="__main__")
        losses.append([row["loss"] for row in result["trainer"].state.log_history if "loss" in row])
        del result
        gc.collect()
    registered.unregister_attention()
    ours, eager = losses
    assert len(ours) == len(eager) == 6
    # transformers' Adafactor, and weights and gradients in bfloat16.
    assert ours == pytest.approx(eager, rel=0.04)
    assert ours[-1] < ours[0] - 0.02
    saved = load_file(tmp_path / "out/model.safetensors")
    assert sum(name.endswith("experts.down_proj_scale_inv") for name in saved) == 2
    assert len((RECIPES / "full_float8.py").read_text("utf-8").splitlines()) <= 80
