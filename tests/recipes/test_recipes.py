"""Every recipe, run at tiny size as a user runs it: by the same script, with the kernel fetched by ``get_kernel``."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CONSUMER = REPOSITORY / ".venv-consumer/bin/python"
RUNNER = Path(__file__).with_name("run_recipes.py")
# TRL makes the adapters of a quantized model bfloat16.
ROUNDING = {"gemma4_26b_qlora": 1e-2}
NAMES = [
    "eight_cards_experts",
    "eight_cards_fsdp",
    "gemma4_26b_qlora",
    "gemma4_31b_long",
    "gemma4_e4b_images",
    "gpt_oss",
    "grpo_t4",
    "qwen3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec

    scratch = tmp_path_factory.mktemp("recipes")
    build(load_spec(REPOSITORY), scratch / "build")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "LOCAL_KERNELS": f"org/scattermoe-lora={scratch / 'build'}",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "cache"),
        "TMPDIR": str(scratch),
    }
    process = subprocess.run(
        [str(CONSUMER), str(RUNNER), str(scratch)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return scratch


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_saves_loads_generates_and_has_the_losses_of_eager_mode(
    name: str, folder: Path
) -> None:
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    ours, eager = result["ours"]["losses"], result["eager"]["losses"]
    assert len(ours) == len(eager) == 6
    assert ours[0] == pytest.approx(eager[0], rel=1e-5, abs=1e-6)
    if name == "grpo_t4":  # The same texts were drawn for the first step; a bit may change all later ones.
        assert result["ours"]["rewards"][0] == result["eager"]["rewards"][0]
    else:
        assert ours == pytest.approx(eager, rel=ROUNDING.get(name, 2e-4))

    loaded = result["reloaded"]
    assert loaded["scattermoe"] == pytest.approx(loaded["eager"], rel=1e-5)
    assert result["generated"] == 4
    if (
        name == "grpo_t4"
    ):  # Its loss is zero by construction: each text was drawn from the policy that it trains.
        assert abs(loaded["eager"] - loaded["eager without"]) > 1e-3
    else:
        assert ours[-1] < ours[0] - 0.02
        assert loaded["eager"] < loaded["eager without"] - 0.02


def test_recipes_are_short_enough_to_copy() -> None:
    recipes = [path for path in (REPOSITORY / "recipes").glob("*.py") if "import tiny" in path.read_text()]
    assert len(recipes) >= 6
    for path in recipes:
        assert len(path.read_text().splitlines()) <= 80, path
