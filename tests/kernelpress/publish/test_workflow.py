"""The publishing workflow: its shell steps run as written, against a real Hub; and what it may do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from localhub import create_token, running_hub

WORKFLOW = Path(__file__).resolve().parents[3] / ".github/workflows/publish.yml"


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())
    return loaded


def run_job(
    job: dict[str, Any], root: Path, tmp_path: Path, **values: str
) -> subprocess.CompletedProcess[str]:
    """Every shell step but the installation, each as the runner would start it."""
    summary = tmp_path / "summary.md"
    summary.touch()
    kept = {key: os.environ[key] for key in ("TMPDIR", "LD_LIBRARY_PATH") if key in os.environ}
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf-home"),
        "GITHUB_STEP_SUMMARY": str(summary),
        **values,
    }
    process = subprocess.CompletedProcess("", 0, "", "")
    output = ""
    for step in job["steps"]:
        if "run" not in step or step["name"] == "Install":
            continue
        environment.setdefault("TAG", "")
        script = tmp_path / "step.sh"
        script.write_text(step["run"])
        process = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        output += process.stdout + process.stderr
        if process.returncode:
            break
    return subprocess.CompletedProcess("", process.returncode, output, summary.read_text())


def test_the_jobs_steps_plan_publish_and_do_nothing_the_second_time(make_kernel, workflow, tmp_path):
    root = make_kernel()
    token = create_token(tmp_path / "hub", "ci")
    with running_hub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=token)
        values = {"DIRECTORY": ".", "REPO_ID": "", "HF_ENDPOINT": hub.endpoint, "TEST": "true"}
        planned = run_job(workflow["jobs"]["plan"], root, tmp_path, **values, HF_TOKEN=token)
        assert planned.returncode == 0, planned.stdout
        assert "would be created" in planned.stderr
        assert not api.repo_exists("org/demo-kernel", repo_type="kernel")
        process = run_job(workflow["jobs"]["publish"], root, tmp_path, **values, HF_TOKEN=token)
        assert process.returncode == 0, process.stdout
        assert re.search(r"v1 +published", process.stderr)
        assert "verified" in process.stderr
        assert token not in process.stdout + process.stderr
        again = run_job(workflow["jobs"]["publish"], root, tmp_path, **values, HF_TOKEN=token)
        assert again.returncode == 0, again.stdout
        assert "nothing to commit" in again.stderr
        source = root / "torch-ext/demo_kernel/__init__.py"
        source.write_text(source.read_text().replace("def label()", "def label(must)"))
        refused = run_job(workflow["jobs"]["plan"], root, tmp_path, **values, HF_TOKEN=token)
        assert refused.returncode != 0
        assert "breaks what it promised" in refused.stderr


def test_actions_are_pinned_by_commit_and_tokens_reach_one_step(workflow):
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert job["permissions"] == (
            {"contents": "read"} | ({"id-token": "write"} if name == "publish" else {})
        )
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"])
            assert "${{" not in step.get("run", ""), "values reach the shell as variables only"
    holders = [step["name"] for job in workflow["jobs"].values() for step in job["steps"]
               if "HF_TOKEN" in step.get("env", {})]  # fmt: skip
    assert holders == ["Publish and verify"]
    assert workflow["jobs"]["publish"]["environment"]


@pytest.mark.parametrize(
    ("tag", "passes"),
    [
        ("", True),
        ("v1", True),
        ("v1.3", True),
        ("v1.0-rc1", True),
        ("v2", False),
        ("v11", False),
        ("v", False),
        ("v1x", False),
    ],
)
def test_a_tag_of_another_version_fails_before_anything_is_installed(
    make_kernel, workflow, tmp_path, tag, passes
):
    steps = workflow["jobs"]["plan"]["steps"]
    names = [step.get("name") for step in steps]
    assert names.index("Tag") < names.index("Install")
    assert workflow["jobs"]["publish"]["needs"] == "plan"
    job = {"steps": [steps[names.index("Tag")]]}
    process = run_job(job, make_kernel(), tmp_path, DIRECTORY=".", TAG=tag)
    assert (process.returncode == 0) == passes, process.stdout
    if not passes:
        assert (
            process.stdout
            == f"::error file=build.toml::tag {tag} is not for version 1: tag v1, or raise `version`\n"
        )


def test_what_the_jobs_install_is_pinned(workflow):
    for job in workflow["jobs"].values():
        (install,) = [step["run"] for step in job["steps"] if step.get("name") == "Install"]
        assert re.search(r"pip install torch==\d+\.\d+\.\d+$", install, re.MULTILINE)
