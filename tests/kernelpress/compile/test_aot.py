from __future__ import annotations

import json
from pathlib import Path

import pytest
from kernelpress.cli.main import app
from kernelpress.compile.aot import Compiled, findings
from typer.testing import CliRunner

BUILD_TOML = """\
[general]
name = "demo-kernel"
version = 1
edition = 5
license = "MIT"
backends = ["cuda"]

[torch-noarch]
"""

SPECS = """\
from dataclasses import dataclass, field

import triton
import triton.language as tl


@triton.jit
def copy(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, {stored})


@dataclass(frozen=True)
class Spec:
    kernel: object
    label: str
    arguments: dict
    constants: dict
    options: dict
    targets: tuple


COMPILE_SPECS = [
    Spec(copy, "plain", {{"source": "*fp32", "target": "*fp32"}}, {{"BLOCK": 64}}, {{"num_warps": 1}}, ("sm_80",))
]
"""


@pytest.mark.parametrize(("stored", "codes"), [("tl.load(source + at)", []), ("nonsense(source)", ["KP401"])])
def test_a_kernel_with_a_specification_must_compile(make_kernel, stored, codes):
    # A name of its own, since the package is imported into this process.
    package = f"aot_{len(codes)}"
    toml = BUILD_TOML.replace("demo-kernel", package.replace("_", "-"))
    root = make_kernel(
        **{
            "build.toml": toml,
            f"torch-ext/{package}/__init__.py": "",
            f"torch-ext/{package}/specs.py": SPECS.format(stored=stored),
        }
    )
    result = CliRunner().invoke(app, ["compile", str(root), "--output", "json"])
    assert result.exit_code == len(codes), result.output
    findings = json.loads(result.output)
    assert [finding["code"] for finding in findings] == codes
    assert all("copy (plain) for sm_80" in finding["message"] for finding in findings)


def test_a_package_without_specifications_has_nothing_to_compile(make_kernel):
    result = CliRunner().invoke(app, ["compile", str(make_kernel())])
    assert result.exit_code == 1
    assert "nothing to compile: no module of the package has a COMPILE_SPECS" in str(result.exception)


def test_a_kernel_that_spills_is_warned_of():
    spilling = Compiled("copy", "plain", "sm_80", shared=64, registers=255, spilled=8)
    (finding,) = findings([spilling], Path("package"))
    assert (finding.code, finding.severity) == ("KP401", "warning")
    assert "copy (plain) for sm_80 spills 8 bytes a thread" in finding.message
