"""Real packages, as their wheels hold them, made into kernels."""

from __future__ import annotations

import functools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from kernelpress.builder.build import build
from kernelpress.findings.model import FindingsError
from kernelpress.spec.pyproject import load_project

LOAD = (
    "import sys; from pathlib import Path; from kernels import get_local_kernel\n"
    "kernel = get_local_kernel(Path(sys.argv[1]))\n"
    "print([hasattr(kernel, name) for name in sys.argv[2:]])\n"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``wheel("name==version")``: the contents of a wheel; skips where it cannot be had."""

    @functools.cache
    def fetch(requirement: str) -> Path:
        where = tmp_path_factory.mktemp(requirement.partition("=")[0])
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        process = subprocess.run(
            [*command, "--dest", str(where), requirement],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if process.returncode:
            pytest.skip(f"{requirement} cannot be downloaded: {process.stderr.strip().splitlines()[-1:]}")
        (archive,) = where.glob("*.whl")
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(where / "unpacked")
        return where / "unpacked"

    return fetch


def test_ligers_operators_load_as_a_kernel(wheel, tmp_path, run_clean):
    top = wheel("liger-kernel==0.8.5")
    include = ["liger_kernel/utils.py", "liger_kernel/backends", "liger_kernel/functional.py"]
    spec = load_project(
        tmp_path, source_dir=top / "liger_kernel/ops", package="liger_kernel.ops", name="liger-ops",
        license="BSD-2-Clause", include=include,
    )  # fmt: skip
    kernel = build(spec)
    names = ["LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerCrossEntropyFunction"]
    process = run_clean(LOAD, str(kernel.directory / "torch-cpu"), *names)
    assert process.stdout == "[True, True, True]\n", process.stderr


def test_without_its_neighbours_liger_is_refused_line_by_line(wheel, tmp_path):
    ops = wheel("liger-kernel==0.8.5") / "liger_kernel/ops"
    spec = load_project(
        tmp_path, source_dir=ops, package="liger_kernel.ops", name="liger-ops", license="BSD-2-Clause"
    )
    with pytest.raises(FindingsError) as caught:
        build(spec)
    for finding in caught.value.blocking:
        assert finding.code == "KP302"
        assert finding.line is not None
        line = finding.path.read_text("utf-8").splitlines()[finding.line - 1]
        assert "import" in line
        assert finding.message.split()[0] in line, "the line is the one that imports the module it names"
    assert len(caught.value.blocking) > 50


def test_axolotls_scattermoe_lora_loads_as_a_kernel(wheel, tmp_path, run_clean):
    top = wheel("axolotl==0.19.0")
    dotted = "axolotl.integrations.kernels.libs.scattermoe_lora"
    spec = load_project(
        tmp_path, source_dir=top.joinpath(*dotted.split(".")), package=dotted, name="ax-scattermoe",
        license="Apache-2.0", include=["axolotl/utils/logging.py", "axolotl/utils/weight_conversions.py"],
    )  # fmt: skip
    kernel = build(spec)
    assert "scattermoe::" not in "".join(
        file.data.decode() for file in kernel.variants[0].files if "kernels/" in file.path
    )
    process = run_clean(LOAD, str(kernel.directory / "torch-cpu"), "parallel_linear", "ScatterMoELoRA")
    assert process.stdout == "[True, True]\n", process.stderr


def test_flas_gla_says_which_import_by_name_keeps_it_from_loading(wheel, tmp_path, run_clean):
    top = wheel("fla-core==0.6.0")
    spec = load_project(
        tmp_path, source_dir=top / "fla/ops/gla", package="fla.ops.gla", name="fla-gla", license="MIT",
        include=["fla/utils", "fla/ops/utils", "fla/ops/common"],
    )  # fmt: skip
    backends = top / "fla/backends.py"
    with pytest.raises(FindingsError) as refused:
        build(spec)
    (error,) = refused.value.blocking
    assert (error.code, error.path) == ("KP305", backends)
    assert error.line is not None
    text = backends.read_text("utf-8")
    assert "importlib.import_module(module_path)" in text.splitlines()[error.line - 1]
    written = "f'fla.ops.{operation}.backends'"
    assert text.count(written) == 1
    backends.write_text(text.replace(written, "f'{__name__}.ops.{operation}.backends'"), "utf-8")
    kernel = build(spec)
    process = run_clean(LOAD, str(kernel.directory / "torch-cpu"), "chunk_gla")
    assert "No module named 'fla'" in process.stderr
    by_name = [
        finding
        for finding in kernel.findings
        if finding.code == "KP305" and finding.path == top / "fla/__init__.py"
    ]
    (finding,) = by_name
    assert finding.line is not None
    assert (
        "importlib.import_module(module_name)"
        in finding.path.read_text("utf-8").splitlines()[finding.line - 1]
    )
    assert f'_vendor/fla/__init__.py", line {finding.line}' in process.stderr, "the very line that then fails"
