from __future__ import annotations

import os
import subprocess
import sys
from glob import glob
from pathlib import Path

import kernelpress
import pytest
import yaml
from kernelpress.builder.build import build
from kernelpress.check.variants import check
from kernelpress.errors import BuildError, SpecError
from kernelpress.hub.client import hub
from kernelpress.project.init import scaffold
from kernelpress.publish.publish import publish
from kernelpress.spec.load import load_spec
from localhub import running_hub
from sample_kernel import source_findings


def test_a_new_project_builds_passes_its_checks_and_tests_and_publishes(tmp_path):
    root = scaffold("new-kernel", "org", tmp_path / "new-kernel")
    spec = load_spec(root)
    kernel = build(spec)
    assert source_findings(root) == []
    assert check(kernel.directory) == []
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=root, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert "6 passed" in process.stdout or "10 passed" in process.stdout
    with running_hub(tmp_path / "hub") as server:
        published = publish(kernel, None, hub(server.endpoint))
    assert [branch.changed for branch in published.branches] == [True, True]


@pytest.mark.parametrize(
    ("name", "organization"),
    [("New", "org"), ("a--b", "org"), ("new", "no/org"), ("n", "o"), ("class", "org"), ("torch", "org")],
)
def test_a_name_that_the_hub_refuses_leaves_nothing_behind(tmp_path, name, organization):
    with pytest.raises(SpecError) as caught:
        scaffold(name, organization, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert ".tmp-" not in str(caught.value)


def test_what_is_there_already_is_kept(tmp_path):
    (tmp_path / "new-kernel").write_text("mine")
    with pytest.raises(BuildError, match="there already"):
        scaffold("new-kernel", "org", tmp_path / "new-kernel")
    assert (tmp_path / "new-kernel").read_text() == "mine"


def test_the_workflow_is_sound_and_installs_kernelpress_from_where_it_is_told(tmp_path):
    workflow = scaffold("new-kernel", "org", tmp_path / "new-kernel") / ".github" / "workflows" / "kernel.yml"
    tools = Path(sys.executable).parent
    for command in (
        [tools / "zizmor", "--quiet", "--offline", workflow],
        [tools / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", workflow],
    ):
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout + process.stderr
    steps = yaml.safe_load(workflow.read_text())["jobs"]["kernel"]["steps"]
    (install,) = [step["run"] for step in steps if step.get("name") == "Install"]
    assert not any("pip install" in step.get("run", "") for step in steps if step.get("name") != "Install")
    # A stand-in for pip that tells what it was asked for.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "bin" / "pip").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    without = subprocess.run(
        ["bash", "-e", "-c", install], capture_output=True, text=True, env={"PATH": path}
    )
    assert without.returncode != 0
    assert "set the variable KERNELPRESS" in without.stderr
    source = "kernelpress @ git+https://example.org/tools@0123abc"
    process = subprocess.run(
        ["bash", "-e", "-c", install],
        capture_output=True,
        text=True,
        env={"PATH": path, "KERNELPRESS": source},
    )
    assert process.stdout.splitlines() == ["install", "torch", "pytest", "numpy", source]


def test_every_template_is_installed_with_the_package():
    templates = Path(kernelpress.__file__).parent / "templates"
    # As setuptools does with what pyproject.toml names as the package's data.
    data = glob(str(templates / "**"), recursive=True)
    assert {str(path) for path in templates.rglob("*") if path.is_file()} <= set(data)
