"""The Triton kernels compile ahead of time, without a GPU, for the architectures that users have; and so do others'.

``make compile`` compiles all that ships. Here: the widest tiles, and what the compiler makes of the main product.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import pytest
from kernelpress.cli.main import app
from kernelpress.compile import aot, specs
from kernelpress.compile.specs import name_of
from kernelpress.errors import BuildError
from typer.testing import CliRunner

# One of each generation that compiles differently.
TARGETS = ("sm_80", "sm_90", "sm_120", "gfx942")


@pytest.fixture(scope="module")
def widest(submodule):
    """``widest(name, use, target)``: the specification of a kernel's largest bfloat16 tile that serves the target (with
    ``timed``, of those that were timed)."""

    def size(spec) -> int:
        # Results a block holds, which is what fills registers.
        sides = ("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_P", "BLOCK_Q")
        return math.prod(spec.constants.get(side, 1) for side in sides)

    def find(name: str, use: str, target: str, timed: bool = False):
        of = "experts" if name.startswith("gate") else "grouped_linear"
        found = [
            spec
            for spec in submodule(f"ops.{of}.specs").COMPILE_SPECS
            if name_of(spec) == name and spec.label.startswith(f"{use} bf16") and target in spec.targets
            and (spec.measured is not None or not timed)
        ]  # fmt: skip
        # Of equal tiles one that ships, not one that is only tried.
        return max(found, key=lambda spec: (size(spec), spec.measured is not None))

    return find


def test_all_specifications_have_their_kernels_arguments_and_known_targets(submodule) -> None:
    package = submodule("ops").__name__.partition(".")[0]
    modules = specs.modules_with_specs(Path(submodule("ops").__file__).parents[1])
    assert modules
    for module in modules:
        assert specs.load_specs(package + module[module.index(".") :])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("grouped_matmul_kernel", "forward"),
        ("grouped_matmul_kernel", "down"),
        ("grouped_matmul_kernel", "dx"),
        ("grouped_outer_kernel", "d down"),
        ("gate_backward_kernel", "clamped silu"),
        ("gate_up_kernel", "clamped silu"),
        ("gate_up_kernel", "gelu_tanh"),
    ],
)
def test_widest_tile_compiles_fits_and_keeps_its_values_in_registers(widest, name, use, target) -> None:
    compiled = aot.compile_one(widest(name, use, target), target)
    assert compiled.error is None
    assert compiled.shared <= specs.TARGETS[target].shared_limit
    assert compiled.registers > 0
    # What a timed launch spills was in the time, and it was the fastest.
    assert compiled.spilled <= (32 if compiled.measured else 0)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("gate_up_kernel", "silu"),
        *(("grouped_matmul_kernel", use) for use in ("down", "d down", "d gate/up")),
    ],
)
def test_tile_that_was_timed_compiles_fits_and_multiplies_as_wide_as_it_is(widest, name, use) -> None:
    """The uses in which they were timed. What they spill, if anything, was in the time."""
    spec = widest(name, use, "sm_90", timed=True)
    compiled = aot.compile_one(spec, "sm_90")
    assert compiled.error is None
    assert compiled.measured.startswith("NVIDIA H100 80GB HBM3, ")
    assert compiled.shared <= specs.TARGETS["sm_90"].shared_limit
    assert compiled.spilled <= 32
    assert "wgmma.mma_async.sync.aligned.m64n256k16" in aot.compiled_kernel(spec, "sm_90").asm["ptx"]


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("grouped_matmul_kernel", "forward"),
        ("grouped_matmul_kernel", "dx"),
        ("gate_up_kernel", "gelu_tanh"),
        ("gate_up_kernel", "silu, transposed"),
        ("gate_up_kernel", "clamped silu"),
    ],
)
@pytest.mark.parametrize(
    ("target", "copies", "multiplies"),
    [
        ("sm_80", "cp.async.cg.shared.global [ %r", "mma.sync.aligned.m16n8k16"),
        ("sm_90", "cp.async.cg.shared.global [ %r", "wgmma.mma_async.sync.aligned.m64n256k16"),
    ],
)
def test_main_product_copies_ahead_and_multiplies_on_tensor_cores(
    widest, name, use, target, copies, multiplies
) -> None:
    compiled = aot.compiled_kernel(widest(name, use, target), target)
    lines = compiled.asm["ptx"].splitlines()
    assert any(multiplies in line for line in lines)
    copied = [line for line in lines if copies in line]
    # 16 bytes a copy: the widest there is.
    assert copied
    assert all(", 0x10," in line for line in copied)
    assert not any("cp.async.ca" in line for line in lines)


@pytest.mark.parametrize("target", TARGETS)
def test_product_that_decodes_most_compiles_and_keeps_its_values_in_registers(submodule, target) -> None:
    specs_few_rows = submodule("ops.grouped_linear.specs_few_rows").COMPILE_SPECS
    (spec,) = (spec for spec in specs_few_rows if spec.label == "nested nf4 bf16")
    compiled = aot.compile_one(spec, target)
    assert compiled.error is None
    assert compiled.shared <= specs.TARGETS[target].shared_limit
    assert compiled.spilled == 0


SOURCE = """
    import triton
    import triton.language as tl
    from types import SimpleNamespace

    @triton.jit
    def product(x_ptr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        at = x_ptr + i[:, None] * BLOCK + i[None, :]
        x = tl.load(at)
        tl.store(at, tl.dot(x, x).to(tl.float16))

    @triton.jit
    def broken(x_ptr):
        tl.store(x_ptr, tl.no_such_function())

    def spec(kernel=product, arguments={"x_ptr": "*fp16:16"}, constants={"BLOCK": 64}, targets=("sm_80",)):
        return SimpleNamespace(kernel=kernel, label="plain", arguments=arguments, constants=constants,
                               options={"num_warps": 8, "num_stages": 2}, targets=targets)
"""


@pytest.fixture
def project(tmp_path: Path):
    """``project(name, specs)``: a package of its own with these specifications."""

    def write(name: str, specs: str) -> Path:
        package = tmp_path / "torch-ext" / name
        package.mkdir(parents=True)
        (tmp_path / "build.toml").write_text(
            f'[general]\nname = "{name}"\nversion = 1\nedition = 5\nlicense = "mit"\n'
            'backends = ["cuda"]\n\n[torch-noarch]\n'
        )
        (package / "__init__.py").write_text("")
        (package / "kernels.py").write_text(textwrap.dedent(SOURCE) + specs + "\n")
        return tmp_path

    return write


def compiled(root: Path, *options: str, code: int) -> str:
    """Output of ``kernelpress compile``."""
    done = CliRunner().invoke(app, ["compile", str(root), *options])
    assert done.exit_code == code, done.output
    return done.output


def test_table_names_every_kernel_and_target(project) -> None:
    root = project("first", "COMPILE_SPECS = [spec(targets=('sm_80', 'gfx90a'))]")
    told = compiled(root, code=0)
    assert [line.split()[:3] for line in told.splitlines()[1:3]] == [
        ["product", "sm_80", "1"],
        ["product", "gfx90a", "1"],
    ]
    assert "2 compilations, 0 failed" in told
    assert "timed on" not in told


def test_table_says_which_launches_were_timed_and_where(project) -> None:
    timed = "spec(), spec(constants={'BLOCK': 32})"
    root = project("timed", f"COMPILE_SPECS = [{timed}]\nCOMPILE_SPECS[0].measured = 'a card, today'")
    told = compiled(root, code=0)
    assert told.splitlines()[1].split()[-1] == "1"
    assert "launches timed on a card, today: 1 of 2 compilations; the others were not timed" in told


def test_kernels_that_do_not_fit_or_compile_are_named_and_fail(project) -> None:
    root = project(
        "second",
        "COMPILE_SPECS = [spec(arguments={'x_ptr': '*fp32:16'}, constants={'BLOCK': 128}, targets=('sm_80', 'sm_86')), "
        "spec(kernel=broken, constants={})]",
    )
    told = compiled(root, "--target", "sm_86", code=1)
    assert "  sm_86   product plain: needs 131072 bytes of shared memory, a block may have 101376" in told
    told = compiled(root, "--target", "sm_80", code=1)
    assert "broken plain: " in told
    assert "module 'triton.language' has no attribute 'no_such_function'" in told
    assert "product plain" not in told


@pytest.mark.parametrize(
    ("name", "specs", "message"),
    [
        ("third", "", "nothing to compile: no module of the package has a COMPILE_SPECS for sm_80"),
        ("fourth", "COMPILE_SPECS = [spec(targets=('sm_86',))]", "nothing to compile"),
        (
            "fifth",
            "COMPILE_SPECS = [spec(constants={})]",
            "product plain: every argument stands once.*missing .'BLOCK'",
        ),
        (
            "sixth",
            "COMPILE_SPECS = [spec(arguments={'y': 'i32', 'x_ptr': 'i32'})]",
            r"missing \[\], unknown \['y'\]",
        ),
        ("seventh", "COMPILE_SPECS = [spec(targets=('sm_10',))]", r"targets \['sm_10'\] are none of"),
        (
            "eighth",
            "import no_such_module\nCOMPILE_SPECS = []",
            "cannot import eighth.kernels: ModuleNotFoundError: No",
        ),
        (
            "eleventh",
            "COMPILE_SPECS = [spec(kernel=None)]",
            "cannot import eleventh.kernels: AttributeError: 'None",
        ),
        ("ninth", "COMPILE_SPECS = [", r"kernels.py:\d+: not valid Python"),
    ],
)
def test_bad_specifications_are_refused_before_anything_compiles(project, name, specs, message) -> None:
    package = project(name, specs) / "torch-ext" / name
    with pytest.raises(BuildError, match=message):
        list(aot.compile_package(package, ["sm_80"], 1))


def test_what_cannot_be_compiled_for_is_refused(project, monkeypatch) -> None:
    package = project("tenth", "COMPILE_SPECS = [spec()]") / "torch-ext" / "tenth"
    with pytest.raises(BuildError, match="sm_10 is none of the targets sm_80, sm_86"):
        list(aot.compile_package(package, ["sm_10"]))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BuildError, match="TRITON_INTERPRET=1 makes Triton interpret, not compile; unset it"):
        list(aot.compile_package(package))
