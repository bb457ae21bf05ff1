"""The unmodified kernels loader, in a clean process, against the embedded Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from localhub import RunningHub

_LOAD = """
import sys
from kernels import get_kernel
kernel = get_kernel(sys.argv[1], version=1)
print(kernel.double(21), kernel.__file__)
"""


def metadata(name: str) -> bytes:
    fields = {
        "name": name,
        "id": f"_{name.replace('-', '_')}_cpu_0123456789",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    return json.dumps(fields).encode()


def load(hub: RunningHub, repo: str, home: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "KERNELS_"))}
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", _LOAD, repo],
        env={
            **kept,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home),
            "KERNELS_CACHE": str(home / "kernels"),
        },
        cwd=home,
        capture_output=True,
        text=True,
        timeout=600,
    )


def publish(api: HfApi, repo: str) -> None:
    api.create_repo(repo, repo_type="kernel")
    operations = [
        CommitOperationAdd("build/torch-cpu/__init__.py", b"from .ops import double\n"),
        CommitOperationAdd("build/torch-cpu/ops.py", b"def double(x):\n    return 2 * x\n"),
        CommitOperationAdd("build/torch-cpu/metadata.json", metadata(repo.split("/")[1])),
    ]
    api.create_branch(repo, branch="v1", repo_type="kernel")
    api.create_commit(repo, operations, commit_message="build", revision="v1", repo_type="kernel")


def test_kernel_of_a_trusted_publisher_loads_by_version(hub: RunningHub, api: HfApi, tmp_path: Path) -> None:
    publish(api, "org/tiny")
    loaded = load(hub, "org/tiny", tmp_path / "home")
    assert loaded.returncode == 0, loaded.stderr
    value, file = loaded.stdout.split()
    assert value == "42"
    assert Path(file).is_relative_to(tmp_path)


def test_kernel_of_an_untrusted_publisher_is_refused_by_the_loader(
    hub: RunningHub, api: HfApi, tmp_path: Path
) -> None:
    publish(api, "stranger/tiny")
    loaded = load(hub, "stranger/tiny", tmp_path / "home")
    assert loaded.returncode != 0
    assert "is not from a trusted publisher" in loaded.stderr


@pytest.mark.parametrize(("name", "trusted"), [("org", True), ("populated", False)])
def test_organization_overview_says_who_is_trusted(api: HfApi, name: str, trusted: bool) -> None:
    api.create_repo(f"populated/{name}", repo_type="kernel")
    overview = api.get_organization_overview(name)
    assert overview.__dict__["trustedKernelPublisher"] is trusted
