"""docs/results.md and the card's figures are what benchmarks/results holds; a recipe's figures come from its runs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """``benchmark("results_page")``: a script of ``benchmarks``."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module


@pytest.fixture
def page(benchmark) -> ModuleType:
    return benchmark("results_page")


RECIPE = {
    "recipe": "some_qlora",
    "command": "python recipes/measure.py some_qlora --tiny",
    "date": "2026-11-27T07:00:00+00:00",
    "commit": "abc",
    "versions": {"torch": "2.13.0", "triton": None},
    "device": "a card",
    "losses": {"ours": [5.0, 4.0], "eager": [5.0, 4.01]},
    "ms_per_step": {"ours": 10.0, "eager": 40.0},
    "peak_bytes": {"ours": 2e9, "eager": 3e9},
    "planned_bytes": 2.1e9,
}


def save(root: Path, name: str, content: Any) -> Path:
    path = root / "benchmarks/results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def test_the_page_its_pictures_and_the_card_are_what_the_command_makes(page: ModuleType) -> None:
    contents = page.read(REPOSITORY)
    files = page.render(contents)
    for path, text in files.items():
        assert (REPOSITORY / path).read_text("utf-8") == text, (
            f"run python benchmarks/results_page.py: {path}"
        )
    pictures = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "docs/results").iterdir()}
    assert pictures | {page.PAGE} == set(files)
    (figures,) = page.CARD_FIGURES.findall((REPOSITORY / "CARD.md").read_text("utf-8"))
    assert figures == page.card_figures(contents)
    assert all(f"(../benchmarks/results/{name})" in files[page.PAGE] for name in contents)


def test_a_recipe_is_shown_with_its_loss_time_memory_and_plan(page: ModuleType, tmp_path: Path) -> None:
    files = page.render(page.read(save(tmp_path, "recipes/some_qlora.json", RECIPE)))
    text = files[page.PAGE]
    row = "| some_qlora | a card | 5.000 to 4.000; 5.000 to 4.010 | 1.0e-02 | 10; 40 | 2000; 3000 | 2100 |"
    assert row in text
    assert "2026-11-27, a card; torch 2.13.0; commit abc." in text
    assert "![Figures of recipes/some_qlora.json](results/recipes-some_qlora.svg)" in text
    assert files[Path("docs/results/recipes-some_qlora.svg")].count("<polyline") == 2
    assert "40 ms" in files[Path("docs/results/recipes-ms.svg")]
    assert "3000 MB" in files[Path("docs/results/recipes-MB.svg")]
    unplanned = page.render({"recipes/some_qlora.json": {**RECIPE, "planned_bytes": None}})
    assert "| not planned |" in unplanned[page.PAGE]
    alone = {key: {"ours": RECIPE[key]["ours"]} for key in ("losses", "ms_per_step", "peak_bytes")}
    text = page.render({"recipes/some_qlora.json": {**RECIPE, **alone}})[page.PAGE]
    assert "| some_qlora | a card | 5.000 to 4.000 |  | 10 | 2000 | 2100 |" in text


def report(hour: int, rows: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
    """A run of ``make gpu`` on a card, as its report.json has it."""
    about = {
        "date": f"2026-11-27T{hour:02}:00:00+00:00",
        "commit": f"c{hour}",
        "versions": {"torch": "2.11.0"},
    }
    return {
        **about,
        "device": "a card",
        "card": {"dense_tflops": 800.0, "copy_gb_per_s": 3000.0},
        "rows": rows,
        **rest,
    }


def row(layer: str, implementation: str, ms: float | None, **rest: Any) -> dict[str, Any]:
    figures = {"refused": "OutOfMemoryError: all of it"} if ms is None else {"ms": ms, "peak_mb": 100.0}
    return {"layer": layer, "implementation": implementation, **figures, **rest}


def test_of_several_runs_each_layers_newest_rows_are_shown(page: ModuleType, tmp_path: Path) -> None:
    tests = {"outcome": "cut off", "passed": 8, "failed": 1, "failures": ["tests/a/test_b.py::test_c"]}
    first = [row("gemma4", "scattermoe", 9.0), row("gemma4", "unsloth", 12.0), row("mlp-norm", "liger", 7.0)]
    first += [row("mixtral", "scattermoe", 30.0, disturbed=True), row("mixtral", "unsloth", 20.0)]
    second = [
        row("gemma4", "scattermoe", 5.0),
        row("gemma4", "axolotl", 6.0),
        row("qwen3", "scattermoe", None),
    ]
    second += [row("mixtral", "scattermoe", None), row("mixtral", "unsloth", 21.0)]
    save(tmp_path, "card/2026-11-27T0900/report.json", report(9, first))
    save(tmp_path, "card/2026-11-27T1100/report.json", report(11, second, tests=tests, about="Hurried."))
    save(tmp_path, "card/2026-11-27T0900/recipes/some_qlora.json", RECIPE)
    nothing = {key: {} for key in ("losses", "ms_per_step", "peak_bytes")}
    save(tmp_path, "card/2026-11-27T1100/recipes/some_qlora.json", {**RECIPE, **nothing})
    contents = page.read(tmp_path)
    files = page.render(contents)
    text = files[page.PAGE]
    assert "| gemma4 | axolotl | 6 | 1.20 | 100 |  |  |" in text
    assert "| gemma4 | unsloth" not in text
    assert "| mixtral | scattermoe | 30 | 1.00 | 100 |  | disturbed |" in text
    assert "- qwen3, scattermoe: OutOfMemoryError: all of it" in text
    assert "| mlp-norm | liger | 7 |" in text
    assert text.index("2026-11-27T1100/report.md") < text.index("2026-11-27T0900/report.md")
    assert "| 8 passed, 1 failed, the rest cut off by time |" in text
    assert "- 2026-11-27T1100: Hurried." in text
    assert "- 2026-11-27T1100: `test_b.py::test_c` failed" in text
    assert "6 ms" in files[Path("docs/results/card-experts.svg")]
    # A recipe that ran out of memory says so by a row without figures; the one before it is linked.
    assert "| some_qlora | a card |  |  |  |  | 2100 |" in text
    assert "Earlier: [card/2026-11-27T0900/recipes/some_qlora.json](" in text

    figures = page.card_figures({**contents, "cpu-growth.json": RECIPE})
    assert " LoRA of rank 16 | 5 ms, 100 MB | 6 ms, 100 MB, axolotl | 1.20x |" in figures
    assert " | 30 ms (disturbed), 100 MB | 20 ms, 100 MB, unsloth | 0.67x |" in figures
    assert "Not timed: MoE layer of Qwen3-30B-A3B, LoRA of rank 16 (OutOfMemoryError);" in figures
    assert "commit c11. Operator tests: 8 passed, 1 failed" in figures
    assert "commit c9." in figures


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("strange.json", {}, "no section of docs/results.md shows it"),
        ("attention_cpu.json", "{", "no JSON"),
        ("attention_cpu.json", {"date": "", "versions": {}}, "without commit"),
        ("recipes/a.json", {key: value for key, value in RECIPE.items() if key != "losses"}, "without losses"),
    ],
)  # fmt: skip
def test_a_file_that_the_page_cannot_show_is_named(
    page: ModuleType, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    with pytest.raises(SystemExit, match=f"error: benchmarks/results/{name}: {message}"):
        page.read(save(tmp_path, name, content))


TRAINING = """
import torch
from transformers import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return {"loss": (x - self.weight).square().mean()}

settings = TrainingArguments("out", max_steps=4, logging_steps=1, save_strategy="no", learning_rate=0.1, report_to=[])
trainer = Trainer(Model(), settings, train_dataset=[{"x": torch.ones(3)}] * 8)
trainer.train()
"""


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """recipes/measure.py, with a recipe of four steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "recipes"), *sys.path])
    module = importlib.import_module("measure")
    monkeypatch.setattr(module, "RECIPES", tmp_path)
    (tmp_path / "recipe.py").write_text(TRAINING)
    return module


def test_losses_and_times_are_those_of_the_recipe(measure: ModuleType, tmp_path: Path) -> None:
    measure.run("recipe", ["--tiny"], "row.json")
    row = json.loads((tmp_path / "row.json").read_text())
    assert len(row["losses"]) == 4
    assert row["losses"][0] > row["losses"][-1]
    assert row["ms_per_step"] > 0
    (tmp_path / "recipe.py").write_text("")
    with pytest.raises(SystemExit, match="recipe has neither losses nor a trainer"):
        measure.run("recipe", [], "row.json")


def test_a_recipe_runs_as_it_is_and_then_eager(
    measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: ModuleType
) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in *"--eager") loss=2.5 ;; *) loss=2.0 ;; esac\n'
        'echo \'{"device": "d", "losses": [3.0, \'$loss\'], "ms_per_step": 7.0, "peak_bytes": 5}\' > "$4"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(measure.importlib.metadata, "version", lambda name: "1.0")
    output = tmp_path / "benchmarks/results/recipes/recipe.json"
    options = ["recipe", "--json", str(output), "--planned", "9", "--warning", "loaded", "--tiny"]
    monkeypatch.setattr(sys, "argv", ["measure.py", *options])
    measure.main()
    (content,) = page.read(tmp_path).values()
    assert content["losses"] == {"ours": [3.0, 2.0], "eager": [3.0, 2.5]}
    assert content["command"] == "python recipes/measure.py recipe --tiny"
    assert (content["planned_bytes"], content["device"], content["warning"]) == (9, "d", "loaded")
    python.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SystemExit, match="recipe ended with exit status 3; nothing was written"):
        measure.main()
