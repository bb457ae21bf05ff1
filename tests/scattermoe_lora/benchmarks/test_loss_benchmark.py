"""The comparison of losses runs, and its implementations agree."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch


@pytest.fixture
def compare_loss(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    return importlib.import_module("compare_loss")


@pytest.mark.parametrize("trained", ["nothing", "weight", "lora"])
def test_every_kind_of_head_is_measured(kernel, compare_loss, capsys, trained) -> None:
    case = compare_loss.Case(trained, "float32", 24, 16, 200)
    rows = compare_loss.measure(kernel, case, "cpu", 0.0)
    assert list(rows) == [compare_loss.OURS, compare_loss.UNFUSED]
    for row in rows.values():
        assert row["ms"] > 0
        assert row["runs"] >= 3
    compare_loss.show("small", case, rows)
    assert "x logits in memory, with 1/" in capsys.readouterr().out


def test_implementations_agree(kernel, compare_loss) -> None:
    hidden, weight, labels = torch.randn(9, 16), torch.randn(30, 16), torch.randint(30, (9,))
    pair = (torch.randn(2, 16), torch.randn(30, 2))
    for arguments in ((None, None), pair):
        first, second = (
            loss(hidden, weight, labels, *arguments)
            for _, loss in compare_loss.implementations(kernel, "cpu")
        )
        torch.testing.assert_close(first, second)


@pytest.mark.usefixtures("compare_loss")
def test_the_picture_of_memory_has_a_bar_for_each_measurement(kernel) -> None:
    loss_memory = importlib.import_module("loss_memory")
    counts = (16, 64)
    results = {"trained": loss_memory.measure(kernel, True, counts, 8192)}
    ours, unfused = results["trained"].values()
    assert ours[1] - ours[0] < (unfused[1] - unfused[0]) / 2
    drawing = loss_memory.picture(results, counts)
    assert drawing.count("<rect") == 1 + 4
    assert f">{unfused[1] / 1e6:,.0f} MB<" in drawing
