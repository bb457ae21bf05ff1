from __future__ import annotations

import json

import pytest
from kernelpress.api.compare import compare
from kernelpress.builder.build import build, prepare
from kernelpress.builder.reproduce import reproduce
from kernelpress.check.freshness import differing_variants
from kernelpress.cli.main import app
from kernelpress.errors import BuildError, CheckError, PublishError
from kernelpress.hub.published import published_files
from kernelpress.spec.load import load_spec
from localhub import running_hub
from typer.testing import CliRunner

PACKAGE = "torch-ext/demo_kernel"
TWICE = f"{PACKAGE}/twice.py"


def run(*arguments: str, code: int = 0, **environment: str) -> str:
    result = CliRunner().invoke(
        app, list(arguments), env={"COLUMNS": "400", **environment}, catch_exceptions=False
    )
    assert result.exit_code == code, result.output
    return result.stdout


def break_twice(root):
    path = root / TWICE
    path.write_text(path.read_text().replace("def twice(x: torch.Tensor)", "def twice(x: torch.Tensor, by)"))


def test_api_names_a_break_and_where_it_stands(make_kernel):
    root = make_kernel()
    build(load_spec(root))
    assert "the public API is the same" in run("api", str(root))
    break_twice(root)
    output = run("api", str(root), code=1)
    assert "breaks twice: required parameter 'by' added (twice.py:18)" in output
    assert "new version" in output


def test_api_says_that_an_addition_keeps_the_version(make_kernel):
    root = make_kernel()
    before = build(load_spec(root)).directory
    path = root / TWICE
    path.write_text(
        path.read_text().replace("def twice(x: torch.Tensor)", "def twice(x: torch.Tensor, by=2)")
    )
    output = run("api", str(root), "--against", str(before / "torch-universal"))
    assert "adds twice: optional parameter 'by' added" in output
    assert "keeps its version" in output


def test_api_reads_a_package_inside_a_project(make_kernel, tmp_path):
    root = make_kernel()
    before = build(load_spec(root)).directory
    break_twice(root)
    options = ("--source-dir", str(root / PACKAGE), "--package", "demo_kernel", "--license", "MIT")
    output = run("api", str(tmp_path), *options, "--against", str(before), code=1)
    assert "breaks twice: required parameter 'by' added (twice.py:18)" in output


def test_a_version_on_the_hub_is_compared_with(make_kernel, tmp_path):
    root = make_kernel()
    with running_hub(tmp_path / "hub") as hub:
        run("publish", str(root), "--endpoint", hub.endpoint)
        published = published_files("org/demo-kernel@v1", hub.endpoint)
        with pytest.raises(
            PublishError, match=r"no such branch.*`kernelpress info org/demo-kernel` lists versions"
        ):
            published_files("org/demo-kernel@v2", hub.endpoint)
        with pytest.raises(PublishError, match="org/nothing is not there or not yours to see"):
            published_files("org/nothing@v1", hub.endpoint)
    with pytest.raises(PublishError, match="does not answer"):
        published_files("org/nothing@v1", hub.endpoint)
    break_twice(root)
    files = {file.path: file.data for file in prepare(load_spec(root)).variants[0].files}
    assert [str(change) for change in compare(published, files)] == ["twice: required parameter 'by' added"]


def test_what_names_no_version_is_refused():
    with pytest.raises(CheckError, match="org/name@v1"):
        published_files("nowhere")


def test_a_build_is_made_again_elsewhere_and_compared(make_kernel):
    assert "reproduced" in run("build", str(make_kernel()), "--verify")


def test_a_build_that_differs_elsewhere_is_refused(make_kernel):
    root = make_kernel()
    kernel = build(load_spec(root))
    (root / TWICE).write_text((root / TWICE).read_text() + "# changed meanwhile\n")
    with pytest.raises(BuildError, match="comes out differently"):
        reproduce(kernel)


def test_check_speaks_json_and_githubs_language(make_kernel):
    root = make_kernel(**{TWICE: "import numpy\n"})
    findings = json.loads(run("check", str(root), "--output", "json", code=1))
    assert "KP303" in [finding["code"] for finding in findings]
    assert "::error file=" in run("check", str(root), "--output", "github", code=1)


def test_check_says_that_the_build_is_of_other_sources(make_kernel):
    root = make_kernel()
    run("build", str(root))
    break_twice(root)
    output = run("check", str(root), code=1)
    assert "KP108 built torch-cpu, torch-cuda, torch-universal of other sources than these" in output
    run("build", str(root))
    toml = (root / "build.toml").read_text()
    (root / "build.toml").write_text(toml.replace('"cuda"]', '"cuda", "xpu"]'))
    assert "and torch-xpu not at all" in run("check", str(root), code=1)


def test_a_build_of_another_tool_is_not_compared_with_the_sources(make_kernel):
    root = make_kernel()
    build(load_spec(root))
    for metadata in (root / "build").glob("*/metadata.json"):
        metadata.write_text(metadata.read_text().replace("kernelpress-", "kernel-builder "))
    break_twice(root)
    assert differing_variants(prepare(load_spec(root)), root / "build") == []


def test_what_every_variant_shows_is_found_once_and_in_the_sources(make_kernel):
    init = "from .twice import twice\n\n__all__ = ['twice', 'gone']\n"
    root = make_kernel(
        **{
            f"{PACKAGE}/__init__.py": init,
            TWICE: "import functools\n\n\n@functools.cache\ndef twice(x): ...\n",
        }
    )
    run("build", str(root))
    findings = json.loads(run("check", str(root), "--output", "json", code=1))
    assert [(finding["code"], finding["path"], finding["line"]) for finding in findings] == [
        ("KP202", str(root / PACKAGE / "__init__.py"), 3),
    ]
    (root / TWICE).write_text("def other(): ...\n\n\ndef twice(x): ...\n")
    run("build", str(root))
    findings = json.loads(run("check", str(root), "--output", "json", code=1))
    places = [(finding["code"], finding["path"], finding["line"]) for finding in findings]
    assert ("KP208", str(root / TWICE), 4) in places
    assert len(findings) == 2


def test_a_side_effect_in_every_variant_is_found_once_in_the_sources(make_kernel):
    effects = "import os, torch\nos.environ['DEMO'] = '1'\nopen('left', 'w').close()\n"
    root = make_kernel(**{f"{PACKAGE}/ops/common.py": f"{effects}DEFAULT = 3.0\n"})
    run("build", str(root))
    findings = json.loads(run("check", str(root), "--output", "json", code=1))
    assert [
        (finding["code"], finding["path"], finding["line"], finding["message"]) for finding in findings
    ] == [
        ("KP205", str(root / PACKAGE / "ops/common.py"), 2, "importing it changes environment variable DEMO"),
        ("KP205", str(root / PACKAGE / "ops/common.py"), 3, "importing it writes the file left"),
    ]


def test_a_rule_is_explained():
    assert run("explain", "kp302").startswith("KP302 (error): modules of the project")


def test_migrate_export_and_init_say_what_they_made(make_kernel, tmp_path, monkeypatch):
    root = make_kernel()
    (root / "build.toml").write_text((root / "build.toml").read_text().replace("edition = 5\n", ""))
    assert "migrated" in run("migrate", str(root))
    assert "nothing to do" in run("migrate", str(root))
    assert "exported" in run("export", str(tmp_path / "out"), "--directory", str(root))
    monkeypatch.chdir(tmp_path)
    assert "next: cd fresh-kernel" in run("init", "fresh-kernel")
