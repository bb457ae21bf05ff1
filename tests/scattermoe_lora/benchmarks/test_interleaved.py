"""Implementations of a case are prepared beside others, and timed in turns alone."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def test_who_is_short_of_memory_beside_others_is_prepared_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[3] / "benchmarks")
    interleaved = importlib.import_module("interleaved")
    order: list[str] = []
    memory_is_free = False

    def small() -> None:
        order.append("small")

    def large() -> None:
        order.append("large")
        time.sleep(0.005)

    def make(step: Callable[[], None], needs_memory: bool) -> Callable[[], None]:
        if needs_memory and not memory_is_free:
            raise torch.OutOfMemoryError("tried to allocate 8 GiB")
        return step

    def describe(step: Callable[[], None]) -> dict[str, Any]:
        step()
        return {"peak": 7}

    def alone(timed: Callable[[], Any]) -> Any:
        nonlocal memory_is_free
        memory_is_free = True
        assert order == ["small"]
        return timed()

    makers = {
        "small": lambda: make(small, False),
        "large": lambda: make(large, True),
        "missing": lambda: importlib.import_module("no_such_package"),
    }
    rows = interleaved.measure_in_turns(makers, describe, "cpu", 0.0, alone)
    assert order[1:] == ["large", *["small", "large"] * 3]
    assert list(rows) == ["small", "large", "missing"]
    assert rows["small"]["of_first"] == 1
    assert rows["large"]["of_first"] > 1
    assert rows["large"]["ms"] >= 5
    assert rows["large"]["peak"] == 7
    assert rows["missing"] == {"not": "ModuleNotFoundError: No module named 'no_such_package'"}
    memory_is_free = False
    never = interleaved.measure_in_turns({"large": lambda: make(large, True)}, describe, "cpu", 0.0)
    assert never == {"large": {"not": "OutOfMemoryError: tried to allocate 8 GiB"}}


def test_the_layers_of_a_gpus_cases_of_projections_can_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[3] / "benchmarks")
    projections = importlib.import_module("compare_projections")
    for hidden in {case.hidden for case in projections.CASES["cuda"].values()}:
        output, gradient = projections.Layer(projections.Case(hidden, 8, 2, "bfloat16"), False)()
        assert output.shape == gradient.shape == (1, 2, hidden)
