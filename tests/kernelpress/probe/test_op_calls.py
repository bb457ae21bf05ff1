"""Findings from calling a package's operators with made-up arguments: rules KP206 and KP207."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernelpress.builder.build import build
from kernelpress.check.variants import check
from kernelpress.findings.model import Finding
from kernelpress.spec.load import load_spec

FAKE = "def _(x):\n    return torch.empty_like(x)"
IMPLEMENTED = '@lib.impl("demo_kernel::scale", "CompositeExplicitAutograd")\n'


def checked(root: Path, file: str, *changes: tuple[str, str], only: str = "torch-cpu") -> list[Finding]:
    """The findings in one variant of the sample kernel after changes to one of its files."""
    path = root / "torch-ext" / "demo_kernel" / file
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    directory = build(load_spec(root)).directory
    for variant in directory.iterdir():
        if variant.name != only:
            variant.rename(root / variant.name)
    return check(directory)


def test_an_operator_that_runs_another_builds_code_is_found(make_kernel):
    # Both builds load, and both register all operators: only a call shows whose code runs.
    (finding,) = checked(
        make_kernel(),
        "ops/scale.py",
        ("    return x * by", "    return torch._demo_scale(x, by)"),
        (
            "def scale(",
            "def _first(x, by):\n    return x * by\n\n\n"
            'if not hasattr(torch, "_demo_scale"):\n    torch._demo_scale = _first\n\n\ndef scale(',
        ),
    )
    assert (finding.code, finding.severity) == ("KP206", "error")
    assert "calling operator 'scale'" in finding.message
    assert finding.message.endswith("ops/scale.py")


def test_an_operator_made_of_another_builds_function_is_found_though_nothing_can_call_it(make_kernel):
    (finding,) = [
        finding
        for finding in checked(
            make_kernel(),
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
        if finding.code == "KP206"
    ]
    assert "operator 'twice' of" in finding.message
    assert "is a function of" in finding.message


def test_an_operator_that_fails_in_the_second_build_alone_is_found(make_kernel):
    (finding,) = checked(
        make_kernel(),
        "ops/scale.py",
        ("    return x * by", "    assert NUMBER == 1\n    return x * by"),
        ("NAMESPACE =", "NUMBER = torch._demo_builds = getattr(torch, '_demo_builds', 0) + 1\nNAMESPACE ="),
    )
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


@pytest.fixture(scope="module")
def found_of_cases(tmp_path_factory) -> dict[str, list[Finding]]:
    """All cases are operators of one kernel, as each kernel costs a process that imports torch."""
    root = tmp_path_factory.mktemp("cases")
    package = root / "torch-ext" / "demo_kernel"
    package.mkdir(parents=True)
    (root / "build.toml").write_text(
        '[general]\nname = "demo-kernel"\nversion = 1\nedition = 5\nlicense = "MIT"\nbackends = ["cpu"]\n'
        "[torch-noarch]\n"
    )
    (package / "__init__.py").write_text("__all__ = []\nfrom . import " + ", ".join(CASES) + "\n")
    for name, (body, fake, *_) in CASES.items():
        (package / f"{name}.py").write_text(
            f'import torch\n\n\n@torch.library.custom_op("demo_kernel::{name}", mutates_args=())\n'
            f"def op(x: torch.Tensor) -> torch.Tensor:\n    return {body}\n\n\n@op.register_fake\ndef _{fake}\n"
        )
    findings = [
        finding for finding in check(build(load_spec(root)).directory) if "torch-cpu" in str(finding.path)
    ]
    assert {finding.code for finding in findings} == {"KP207"}, findings
    return {name: [finding for finding in findings if repr(name) in finding.message] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_what_a_fake_implementation_does_is_found_with_its_line(found_of_cases, name):
    (finding,) = found_of_cases[name]
    *_, severity, message, with_line = CASES[name]
    assert finding.severity == severity
    assert message in finding.message
    if with_line:
        assert (finding.path.name, finding.line) == (f"{name}.py", 11)


def test_a_fake_implementation_with_sizes_that_only_data_tells_is_no_finding(make_kernel):
    assert not checked(
        make_kernel(),
        "twice.py",
        ("    return x * FACTOR", "    return x.reshape(-1)[x.reshape(-1) != 0]"),
        (FAKE, "def _(x):\n    return x.new_empty(torch.library.get_ctx().new_dynamic_size())"),
    )


def test_an_operator_that_ends_the_process_when_called_is_no_failure_to_load(make_kernel):
    findings = checked(make_kernel(), "twice.py", ("return x * FACTOR", "import os; os._exit(9)"))
    assert {(finding.code, finding.severity) for finding in findings} == {("KP207", "note")}
    assert "status 9" in findings[0].message


def test_operators_with_ranks_indices_options_and_names_are_run_all_the_same(make_kernel):
    text = """\
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
    root = make_kernel(**{"torch-ext/demo_kernel/ops/common.py": text})
    assert not checked(root, "twice.py")
