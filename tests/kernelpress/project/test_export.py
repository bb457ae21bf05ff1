from __future__ import annotations

import pytest
from kernelpress.builder.build import build
from kernelpress.errors import BuildError
from kernelpress.project.export import export
from kernelpress.spec.load import load_spec
from kernels._rust import Build

USE = (
    "import sys, torch; from pathlib import Path; from kernels import get_local_kernel\n"
    "kernel = get_local_kernel(Path(sys.argv[1]))\n"
    "print(kernel.twice(torch.ones(1)).item(), kernel.scale(torch.ones(1)).item(), kernel.label())\n"
)


def test_an_exported_project_is_upstreams_and_builds_to_the_same_behaviour(make_kernel, tmp_path, run_clean):
    out = export(load_spec(make_kernel()), tmp_path / "exported")
    Build.open(out)  # the Kernel Hub's own parser
    assert {path.name for path in out.iterdir()} == {"build.toml", "flake.nix", "CARD.md", "torch-ext"}
    sources = "".join(path.read_text() for path in out.rglob("*.py"))
    assert "kernelpress_own_namespace" not in sources
    assert sources.count("demo_kernel::") == 2, "the look-alikes, in a docstring and a label"
    kernel = build(load_spec(out))
    process = run_clean(USE, str(kernel.directory / "torch-cpu"))
    assert process.stdout == "2.0 3.0 demo_kernel::twice\n", process.stderr


def test_an_export_moves_no_line(make_kernel, tmp_path):
    root = make_kernel()
    out = export(load_spec(root), tmp_path / "exported")
    for path in (root / "torch-ext").rglob("*.py"):
        exported = out / path.relative_to(root)
        assert len(exported.read_text().splitlines()) == len(path.read_text().splitlines())


def test_a_directory_with_something_in_it_is_not_written_to(make_kernel, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(BuildError, match="not empty"):
        export(load_spec(make_kernel()), tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
