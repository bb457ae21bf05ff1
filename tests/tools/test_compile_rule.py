from __future__ import annotations

import pytest
from kernelpress.compile_rule import check_compilation
from kernelpress.spec import load_spec

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
    found = check_compilation(load_spec(root))
    assert [each.code for each in found] == codes
    assert all("copy (plain) for sm_80" in each.message for each in found)


def test_a_package_without_specifications_has_nothing_to_compile(make_kernel):
    assert check_compilation(load_spec(make_kernel())) == []
