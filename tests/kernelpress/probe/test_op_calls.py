"""Findings from calling a package's operators with made-up arguments: rules KP206 and KP207."""

from __future__ import annotations

import pytest
from sample_kernel import FILES, PACKAGE, changed

FAKE = "def _(x):\n    return torch.empty_like(x)"


# Both builds load, and both register all operators: only a call shows whose code runs.
@pytest.mark.kernel(
    changed(
        "ops/scale.py",
        ("    return x * by", "    return torch._demo_scale(x, by)"),
        (
            "def scale(",
            "def _first(x, by):\n    return x * by\n\n\n"
            'if not hasattr(torch, "_demo_scale"):\n    torch._demo_scale = _first\n\n\ndef scale(',
        ),
    )
)
def test_an_operator_that_runs_another_builds_code_is_found(findings):
    (finding,) = findings
    assert (finding.code, finding.severity) == ("KP206", "error")
    assert "calling operator 'scale'" in finding.message
    assert finding.message.endswith("ops/scale.py")


@pytest.mark.kernel(
    changed(
        "twice.py",
        (
            "@operator(",
            "def _own(x: torch.Tensor) -> torch.Tensor:\n    raise RuntimeError('needs a GPU')\n\n\n@operator(",
        ),
        ("def _twice(x: torch.Tensor) -> torch.Tensor:\n    return x * FACTOR", "class _(): pass"),
        (
            '@operator("demo_kernel::twice", mutates_args=())\nclass _(): pass',
            '_own = torch._demo_own = getattr(torch, "_demo_own", _own)\n'
            'operator("demo_kernel::twice", _own, mutates_args=())',
        ),
    )
)
def test_an_operator_made_of_another_builds_function_is_found_though_nothing_can_call_it(findings):
    (finding,) = [finding for finding in findings if finding.code == "KP206"]
    assert "operator 'twice' of" in finding.message
    assert "is a function of" in finding.message


@pytest.mark.kernel(
    changed(
        "ops/scale.py",
        ("    return x * by", "    assert NUMBER == 1\n    return x * by"),
        ("NAMESPACE =", "NUMBER = torch._demo_builds = getattr(torch, '_demo_builds', 0) + 1\nNAMESPACE ="),
    )
)
def test_an_operator_that_fails_in_the_second_build_alone_is_found(findings):
    (finding,) = findings
    assert finding.code == "KP206"
    assert "AssertionError" in finding.message


# The body of an operator, its fake implementation, and what is found: severity, text, and whether with the line.
CASES = {
    "unknown": (
        "2 * x",
        "(x):\n    return torch.empty_like(y)",
        "warning",
        "NameError: name 'y' is not defined",
        True,
    ),
    "attribute": (
        "2 * x",
        "(x):\n    return x.new_emty(x.shape)",
        "warning",
        "no attribute 'new_emty'",
        True,
    ),
    "data": (
        "2 * x",
        "(x):\n    return x.new_empty(int(x.sum()))",
        "warning",
        "DataDependentOutputException",
        True,
    ),
    "parameters": (
        "2 * x",
        "(x, y):\n    return x",
        "warning",
        "missing 1 required positional argument",
        False,
    ),
    "result": (
        "2 * x",
        "(x):\n    return None",
        "warning",
        "it returns NoneType, and the schema says Tensor",
        False,
    ),
    "shape": (
        "2 * x",
        "(x):\n    return x.new_empty(x.shape[:-1])",
        "note",
        "promised otherwise than it gave",
        False,
    ),
    "picky": ("2 * x", "(x):\n    assert x.shape == (3, 5, 7)", "note", "'picky' was not run", False),
    "gpu": ("gpu(x)", "(x):\n    return torch.empty_like(x)", "note", "on fake tensors alone", False),
}


def operators_of_cases() -> dict[str, str | None]:
    """All cases as operators of one kernel."""
    files: dict[str, str | None] = dict.fromkeys(FILES)
    files["build.toml"] = FILES["build.toml"]
    files[f"{PACKAGE}/__init__.py"] = "__all__ = []\nfrom . import " + ", ".join(CASES) + "\n"
    for name, (body, fake, *_) in CASES.items():
        files[f"{PACKAGE}/{name}.py"] = (
            f'import torch\n\n\n@torch.library.custom_op("demo_kernel::{name}", mutates_args=())\n'
            f"def op(x: torch.Tensor) -> torch.Tensor:\n    return {body}\n\n\n@op.register_fake\ndef _{fake}\n"
        )
    return files


@pytest.mark.kernel(operators_of_cases())
def test_what_a_fake_implementation_does_is_found_with_its_line(findings):
    assert len(findings) == len(CASES)
    for name, (_, _, severity, message, with_line) in CASES.items():
        (finding,) = [finding for finding in findings if repr(name) in finding.message]
        assert (finding.code, finding.severity) == ("KP207", severity)
        assert message in finding.message
        if with_line:
            assert (finding.path.name, finding.line) == (f"{name}.py", 11)


@pytest.mark.kernel(
    changed(
        "twice.py",
        ("    return x * FACTOR", "    return x.reshape(-1)[x.reshape(-1) != 0]"),
        (FAKE, "def _(x):\n    return x.new_empty(torch.library.get_ctx().new_dynamic_size())"),
    )
)
def test_a_fake_implementation_with_sizes_that_only_data_tells_is_no_finding(findings):
    assert not findings


@pytest.mark.kernel(changed("twice.py", ("return x * FACTOR", "import os; os._exit(9)")))
def test_an_operator_that_ends_the_process_when_called_is_no_failure_to_load(findings):
    assert {(finding.code, finding.severity) for finding in findings} == {("KP207", "note")}
    assert "status 9" in findings[0].message


PICK = """\
import torch

MODES = {"sum": torch.sum, "mean": torch.mean}


@torch.library.custom_op("demo_kernel::pick", mutates_args=())
def pick(
    rows: torch.Tensor, table: torch.Tensor, index: torch.Tensor, bias: torch.Tensor | None, mode: str, steps: list[int]
) -> list[torch.Tensor]:
    a, b = rows.shape
    c, d, e = table.shape
    assert b == d and len(steps) == 3
    found = torch.einsum("ab,abe->ae", rows, table[index])
    return [MODES[mode](found if bias is None else found + bias, 1)]


@pick.register_fake
def _(rows, table, index, bias, mode, steps):
    a, b = rows.shape
    c, d, e = table.shape
    assert len(steps) == 3
    MODES[mode]
    return [rows.new_empty(a)]


DEFAULT = 3.0
"""


@pytest.mark.kernel({f"{PACKAGE}/ops/common.py": PICK})
def test_operators_with_ranks_indices_options_and_names_are_run_all_the_same(findings):
    assert not findings
