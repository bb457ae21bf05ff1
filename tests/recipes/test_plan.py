"""plan.py: predictions against measured steps, sums that can be checked by hand, and what it says to bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from measured_steps import REPOSITORY, config, measured_peak, plan, predicted_peak, setup


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The built kernel package, registered."""
    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec
    from kernels import get_kernel

    out = tmp_path_factory.mktemp("kernel") / "build"
    build(load_spec(REPOSITORY), out)
    os.environ["LOCAL_KERNELS"] = f"org/scattermoe-lora={out}"
    package = get_kernel("org/scattermoe-lora", version=1)
    package.register()
    package.register_attention()
    yield package
    package.unregister_attention()
    package.unregister()


@pytest.mark.parametrize(
    ("name", "recipe", "dtype", "kernels", "checkpointing", "shape"),
    [
        ("Llama", "lora", "float32", "ours", True, (1, 128)),
        ("Llama", "full", "bfloat16", "eager", False, (2, 200)),
        ("Qwen3-MoE", "lora", "bfloat16", "ours", False, (1, 384)),
        ("Qwen3-MoE", "full", "bfloat16", "eager", True, (2, 200)),
        ("Qwen3-MoE", "full", "bfloat16", "defaults", True, (4, 100)),
        ("Mixtral", "lora", "float32", "ours", True, (2, 300)),
        ("Mixtral", "full", "float32", "ours", False, (2, 300)),
        ("gpt-oss", "lora", "float32", "ours", True, (2, 200)),
        ("Gemma 4 dense", "full", "float32", "ours", True, (2, 200)),
        ("Gemma 4 dense", "lora", "bfloat16", "eager", False, (1, 256)),
        ("Gemma 4 MoE", "lora", "bfloat16", "ours", True, (2, 200)),
        ("Gemma 4 MoE", "full", "bfloat16", "ours", False, (3, 150)),
        ("Gemma 4 E4B", "lora", "float32", "ours", True, (2, 200)),
        ("Gemma 4 E4B", "full", "bfloat16", "eager", False, (1, 200)),
    ],
)
def test_predicted_peak_is_within_a_tenth_of_the_measured_one(
    kernel: ModuleType, name: str, recipe: str, dtype: str, kernels: str, checkpointing: bool, shape: Any
) -> None:
    run = setup(name, kernels, dtype=dtype, checkpointing=checkpointing)
    predicted = predicted_peak(config(name), recipe, run, shape)
    assert predicted == pytest.approx(measured_peak(config(name), recipe, run, shape, kernel), rel=0.1)


@pytest.fixture(scope="module")
def planner() -> Any:
    return plan.Planner(config("Qwen3-MoE"), "full")


def test_parts_are_what_parameters_take_and_shrink_with_cards(planner: Any) -> None:
    one = planner.plan(1, 128, plan.CARDS["H100"])
    count = sum(p.numel() for p in planner.model.parameters())
    assert sum(size for name, size in one.parts.items() if "weights" in name) == 2 * count
    assert one.parts["optimizer"] == 4 * count
    assert sum(one.parts.values()) == one.peak
    assert one.fits
    assert not one.traffic

    # As many as there are experts, which FSDP2 splits among them.
    eight = planner.plan(1, 128, plan.CARDS["H100"], plan.Cluster(8))
    experts = "weights: experts (bfloat16)"
    assert eight.parts[experts] == one.parts[experts] / 8
    assert eight.traffic["reduce-scatter"] == pytest.approx(2 * count * 7 / 8, rel=0.01)
    # FSDP2 splits the first dimension alone: more cards than experts do not help.
    assert planner.plan(1, 128, None, plan.Cluster(64)).parts[experts] == eight.parts[experts]
    # Unless experts are divided first: then each card has an eighth of the rows of one group.
    parallel = planner.plan(1, 128, plan.CARDS["H100"], plan.Cluster(16, experts=8))
    pairs, hidden, layers = 128 * 2, 128, 3
    assert parallel.traffic["all-to-all"] == layers * 6 * pairs * 7 / 8 * hidden * 2
    assert parallel.step_seconds >= parallel.seconds["compute"] > 0


def test_adapters_of_the_scripts_take_six_bytes_a_parameter_and_are_on_attention_and_experts() -> None:
    planner = plan.Planner(config("Gemma 4 MoE"), "qlora-8bit")
    result = planner.plan(1, 16)
    trained = [name for name, p in planner.model.named_parameters() if p.requires_grad]
    assert {name.split(".")[-2] for name in trained} == {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}
    assert result.parts["adapters"] == 2 * result.trained
    assert result.parts["optimizer"] == 2 * (1 + 4 / 256) * result.trained
    assert planner.step(1, 16).peak["gradients"] <= 2 * result.trained + 512 * len(trained)


def test_accumulation_keeps_all_gradients_and_shares_the_optimizers_time(planner: Any) -> None:
    one = planner.plan(1, 128, plan.CARDS["H100"])
    several = plan.Planner(config("Qwen3-MoE"), "full", plan.Setup(accumulate=4))
    four = several.plan(1, 128, plan.CARDS["H100"])
    assert four.parts["gradients"] == 2 * four.trained
    assert four.peak > one.peak
    assert (four.operations, four.seconds["optimizer"]) == (4 * one.operations, one.seconds["optimizer"])


def test_towers_are_frozen() -> None:
    values = config("Gemma 4 E4B")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    values.vision_config = transformers.Gemma4VisionConfig(**tower, num_key_value_heads=2, head_dim=16)
    model = plan.Planner(values, "full").model
    trained = {p.plan_part: p.requires_grad for p in model.parameters()}
    assert {part for part, is_trained in trained.items() if not is_trained} == {"towers"}


def test_the_plan_of_a_step_of_gemma_4_26b_is_near_what_an_h200_took() -> None:
    file = REPOSITORY / "benchmarks/results/h200/2026-11-27T1120/recipes/gemma4_26b_80.json"
    measured = json.loads(file.read_text())["peak_bytes"]["ours"]
    values = plan.load_config(REPOSITORY / "recipes/configs/gemma-4-26B-A4B.json")
    planned = plan.Planner(values, "qlora-8bit").plan(2, 8192)
    tensors = planned.peak - planned.parts["allocator's slack"] - plan.CONTEXT
    assert tensors == pytest.approx(measured, rel=0.02)


def test_float8_training_takes_two_bytes_a_parameter_and_the_rows_and_columns() -> None:
    settings = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 256}
    planner = plan.Planner(transformers.LlamaConfig(**settings, architectures=["LlamaForCausalLM"]), "fp8")
    result = planner.plan(1, 16)
    matrices = [p for p in planner.model.parameters() if p.plan_format == "fp8"]
    assert len(matrices) == 7
    weights = sum(size for name, size in result.parts.items() if "fp8" in name)
    assert weights == sum(p.numel() for p in matrices) * (1 + 4 / 128**2)
    assert result.parts["optimizer"] == sum(
        4 * sum(p.shape) for p in planner.model.parameters()
    )  # A norm has one row, which is itself.
    assert planner.step(1, 16).peak["gradients"] < sum(2 * p.numel() for p in planner.model.parameters())


def test_the_largest_that_fits_is_found_but_for_a_sixtyfourth(planner: Any) -> None:
    capacity = planner.plan(2, 1000).peak
    card = plan.Card(capacity / plan.GIB, 0, 0, 0)
    length = plan.largest(lambda n: planner.plan(2, n, card), 128, 8, 4096)
    assert planner.plan(2, length, card).fits
    assert length >= 1000 * 63 // 64 - 8
    assert plan.largest(lambda n: planner.plan(2, n, plan.Card(0.001, 0, 0, 0)), 512, 8, 4096) == 0


def test_the_allocator_keeps_what_it_took() -> None:
    mib = 1 << 20
    assert plan.reserved([(1, 512), (2, 1024)]) == 2 * mib
    # Released neighbours join, and serve a larger request.
    events = [(1, 12 * mib), (2, 8 * mib), (1, -1), (2, -1), (3, 12 * mib)]
    assert plan.reserved(events) == 12 * mib + 20 * mib
    assert plan.reserved([(1, 3 * mib), (2, 3 * mib), (1, -1), (2, -1), (3, 6 * mib)]) == 20 * mib


def run(tmp_path: Path, *arguments: str, text: str | None = None) -> tuple[int | str | None, Path]:
    """What the command ends with: nothing, or its message."""
    path = tmp_path / "config.json"
    path.write_text(text if text is not None else json.dumps(config("Llama").to_dict()), "utf-8")
    command = ["plan.py", "--model", str(path), "--card", "24GB", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        try:
            plan.main()
        except SystemExit as e:
            return e.code, path
    return None, path


def test_the_command_prints_a_table_and_writes_the_plan(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "plan.json"
    code, _ = run(tmp_path, "--json", str(out), "--length", "256", "--card", "H100", "--cards", "8")
    assert code is None
    text = capsys.readouterr().out
    for words in ("adapters", "all-gather", "By the roof", "longest rows", "Without checkpointing", "fits"):
        assert words in text
    values = json.loads(out.read_text())
    assert values["fits"]
    assert values["peak"] == pytest.approx(sum(values["parts"].values()))


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        ((), "{", "is not JSON"),
        ((), "{}", "has no model_type"),
        ((), '{"model_type": "no-such"}', "does not accept this configuration"),
        (
            (),
            '{"model_type": "bert", "vocab_size": 8, "architectures": ["BertModel"]}',
            "not a language model",
        ),
        ((), '{"model_type": "llama", "hidden_size": "64"}', "expected int, got str"),
        (
            (),
            '{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 8}',
            "no linear layers",
        ),
        (("--card", "B52"), None, "--card: expected memory such as 24GB or one of T4"),
        (
            ("--recipe", "dora"),
            None,
            "--recipe: expected one of qlora-8bit, qlora-attention, qlora, lora-16bit, "
            "lora-attention, lora, fp8, full, got 'dora'",
        ),
        (("--length", "0"), None, "--length: expected 1 or more"),
        (("--bandwidth", "nan"), None, "--bandwidth: expected a number above 0"),
        (("--cards", "6", "--expert-parallel", "4"), None, "a multiple of --expert-parallel"),
        (
            ("--cards", "3", "--expert-parallel", "3"),
            '{"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64}',
            "a divisor of 8 experts, got 3",
        ),
        (("--model", "/nowhere/config.json"), None, "cannot be read"),
        (
            ("--png", "/nowhere/plan.png"),
            None,
            "/nowhere/plan.png: cannot be written: there is no such directory",
        ),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, arguments: Any, text: str | None, message: str) -> None:
    out = tmp_path / "plan.json"
    code, _ = run(tmp_path, *arguments, "--json", str(out), text=text)
    assert isinstance(code, str)
    assert code.startswith("plan: ")
    assert "\n" not in code
    assert message in code
    assert not list(tmp_path.glob("plan.json*"))


def test_a_card_too_small_says_what_would_fit(tmp_path: Path) -> None:
    code, path = run(tmp_path, "--recipe", "full", "--card", "0.66GiB", "--length", "8192", "--batch", "4")
    assert isinstance(code, str)
    assert code.startswith("plan: does not fit: ")
    shorter = re.search(r"--batch 1 --length (\d+)", code)
    assert shorter is not None
    planner = plan.Planner(plan.load_config(path), "full")
    assert planner.plan(1, int(shorter[1]), plan.parse_card("0.66GiB")).fits


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    # In the environment that has what recipes need, and nothing of this repository.
    python = REPOSITORY / ".venv-consumer/bin/python"
    _, path = run(tmp_path, "--recipe", "none")
    out = tmp_path / "plan.png"
    script = [str(REPOSITORY / "recipes/plan.py"), "--model", str(path), "--card", "24GB", "--length", "64"]
    result = subprocess.run([python, *script, "--png", str(out)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gemma-4-26B-A4B", 25.2),
        ("gemma-4-31B", 30.7),
        ("gemma-4-E4B", 7.9),
        ("gemma-4-E2B", 5.1),
        ("Qwen3-30B-A3B", 30.5),
        ("gpt-oss-20b", 20.9),
    ],
)
def test_models_of_the_examples_have_as_many_parameters_as_published(name: str, billions: float) -> None:
    values = plan.load_config(REPOSITORY / f"recipes/configs/{name}.json")
    model = plan.build(values, plan.RECIPES["full"], plan.Setup())
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.05)
