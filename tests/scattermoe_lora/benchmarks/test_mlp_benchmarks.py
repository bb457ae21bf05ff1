"""The comparison of what stands between the projections runs, and compares the same thing."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("compare_mlp")


@pytest.mark.parametrize("operation", ["geglu", "swiglu", "mlp", "norm", "add-norm"])
def test_the_comparison_of_an_operation_compares_the_same_thing(kernel, compare, operation, capsys) -> None:
    for dtype in ("float32", "bfloat16"):
        case = compare.Case(operation, dtype, 20, 32, 48)
        rows = compare.measure(kernel, case, "cpu", 0.0)
        assert list(rows) == ["scattermoe", "transformers"]
        for row in rows.values():
            assert row["ms"] > 0
            assert row["runs"] == 3
            assert row["difference"] < (1e-5 if dtype == "float32" else compare.CLOSE)
        compare.show(operation, case, rows)
        assert "x transformers, with " in capsys.readouterr().out
    assert {case.operation for case in compare.CASES["cuda"].values()} >= {operation}


def test_an_implementation_that_is_not_installed_is_named_and_the_others_measured(
    kernel, compare, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(compare, "eager", compare.liger)
    case = compare.Case("norm", "float32", 4, 8)
    rows = compare.measure(kernel, case, "cpu", 0.0)
    assert rows["transformers"]["not"].startswith("ModuleNotFoundError: ")
    assert rows["scattermoe"]["ms"] > 0
    compare.show("norm", case, rows)
    assert "ModuleNotFoundError" in capsys.readouterr().out


def test_a_case_of_another_name_is_refused_before_anything_is_measured(compare, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["compare_mlp.py", "--cases", "geglu,tiny"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "--cases: tiny: none of geglu, " in capsys.readouterr().err
