"""The real git command against the embedded Hub."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from localhub import RunningHub


def git(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # Neither the developer's configuration nor a prompt may get in the way.
    clean = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}
    return subprocess.run(
        ["git", *arguments], cwd=cwd, env={**os.environ, **clean}, capture_output=True, text=True, timeout=600
    )


@pytest.fixture
def repo(api: HfApi, new_repo: Callable[..., str]) -> str:
    name = new_repo()
    for number in range(3):
        api.create_commit(
            name,
            [CommitOperationAdd("n.txt", str(number).encode()), CommitOperationAdd(f"f/{number}", b"\0x")],
            commit_message=f"commit {number}",
            repo_type="kernel",
        )
        if number == 1:
            api.create_branch(name, branch="v1", repo_type="kernel")
            api.create_tag(name, tag="t1", tag_message="annotated", repo_type="kernel")
    return name


@pytest.mark.parametrize("suffix", ["", ".git", "/"])
def test_clone_brings_history_branches_and_tags(
    hub: RunningHub, repo: str, tmp_path: Path, suffix: str
) -> None:
    cloned = git("clone", f"{hub.endpoint}/kernels/{repo}{suffix}", str(tmp_path / "clone"))
    assert cloned.returncode == 0, cloned.stderr
    log = git("log", "--format=%s", cwd=tmp_path / "clone")
    assert log.stdout.splitlines() == ["commit 2", "commit 1", "commit 0", "initial commit"]
    for revision in ("v1", "t1"):
        assert git("checkout", revision, cwd=tmp_path / "clone").returncode == 0
        assert (tmp_path / "clone" / "n.txt").read_text() == "1"
    assert git("fsck", "--full", "--strict", cwd=tmp_path / "clone").returncode == 0


def test_fetch_brings_only_what_is_new(hub: RunningHub, api: HfApi, repo: str, tmp_path: Path) -> None:
    git("clone", f"{hub.endpoint}/kernels/{repo}", str(tmp_path / "clone"))
    api.create_commit(repo, [CommitOperationAdd("n.txt", b"new")], commit_message="later", repo_type="kernel")
    pulled = git("pull", "--ff-only", cwd=tmp_path / "clone")
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "clone" / "n.txt").read_text() == "new"


def test_shallow_clone_of_a_branch(hub: RunningHub, repo: str, tmp_path: Path) -> None:
    url = f"{hub.endpoint}/kernels/{repo}"
    cloned = git("clone", "--depth", "1", "--branch", "v1", url, str(tmp_path / "clone"))
    assert cloned.returncode == 0, cloned.stderr
    assert git("rev-list", "--count", "HEAD", cwd=tmp_path / "clone").stdout.strip() == "1"


def test_clone_of_a_model_has_no_prefix(hub: RunningHub, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("org/cloned-model")
    assert git("clone", f"{hub.endpoint}/org/cloned-model", str(tmp_path / "clone")).returncode == 0


def test_push_is_refused_with_advice(hub: RunningHub, repo: str, tmp_path: Path) -> None:
    git("clone", f"{hub.endpoint}/kernels/{repo}", str(tmp_path / "clone"))
    pushed = git("push", "origin", "HEAD:refs/heads/other", cwd=tmp_path / "clone")
    assert pushed.returncode != 0
    assert "takes no git push" in pushed.stderr
    assert "kernelpress publish" in pushed.stderr


def test_clone_of_a_missing_repository_fails(hub: RunningHub, tmp_path: Path) -> None:
    cloned = git("clone", f"{hub.endpoint}/kernels/org/never", str(tmp_path / "clone"))
    assert cloned.returncode != 0
    assert "not found" in cloned.stderr


@pytest.mark.parametrize(
    "body",
    [
        b"garbage",
        b"0000",
        b"ffff",
        b"0032want " + b"0" * 40 + b"\n0000",
        b"0067want " + b"a" * 40 + b" side-band-64k thin-pack ofs-delta\n0000",
        b"0009want\n",
        b"000fdeepen xyz\n",
    ],
)
def test_malformed_fetch_requests_are_4xx_or_empty(hub: RunningHub, repo: str, body: bytes) -> None:
    for headers in ({}, {"Content-Encoding": "gzip"}):
        answer = httpx2.post(
            f"{hub.endpoint}/kernels/{repo}/git-upload-pack", content=body, headers=headers, timeout=60
        )
        assert answer.status_code < 500
