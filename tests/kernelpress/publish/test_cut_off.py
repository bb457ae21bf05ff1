"""A release that was killed before it was verified: the same command again verifies it, or takes it back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from kernelpress.errors import PublishError
from kernelpress.hub.repository import branch_heads, tree
from kernelpress.publish import release as module
from kernelpress.publish.journal import Journal
from kernelpress.publish.publish import PublishedBranch, publish
from kernelpress.publish.release import release
from kernelpress.publish.verify import Verification
from localhub import RunningHub
from sample_kernel import make

TWICE = "torch-ext/demo_kernel/twice.py"
BROKEN = 'import os\nif "LOCAL" not in os.environ:\n    raise RuntimeError("broken here")\n'

KILLED_BEFORE_THE_PROOF = """
import os, signal, sys
from pathlib import Path
from kernelpress.publish import release
from kernelpress.hub.client import hub
from kernelpress.spec.load import load_spec
from kernelpress.builder.build import build
release.verify = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
release.release(build(load_spec(Path(sys.argv[1]))), sys.argv[2], hub(sys.argv[3]))
"""


@pytest.fixture(autouse=True)
def notes_of_its_own(no_settings_of_the_developers_own, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def break_it(root: Path) -> None:
    (root / TWICE).write_text((root / TWICE).read_text().replace("FACTOR = 2", BROKEN + "FACTOR = 3"))


@pytest.fixture
def broken_for_consumers(monkeypatch) -> None:
    """Every release is found broken, without the processes that fetch and load it: two tests here need those."""
    monkeypatch.setattr(module, "verify", lambda *arguments: Verification(("broken here",)))


def contents(api: HfApi, repo: str, revision: str) -> dict[str, str]:
    return {path: entry.blob_id for path, entry in tree(api, repo, revision).items()}


def killed(root: Path, repo: str, server: RunningHub) -> None:
    process = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_THE_PROOF, str(root), repo, server.endpoint],
        env=os.environ, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert process.returncode == -9, process.stderr


def test_a_good_release_is_verified_by_the_next_run_and_once_only(make_kernel, api, repo, server):
    root = make_kernel()
    killed(root, repo, server)
    result = release(make(root), repo, api)
    assert not result.published.changed
    assert result.seen is not None
    assert result.seen.faults == ()
    assert release(make(root), repo, api).seen is None


def test_a_bad_release_is_taken_back_by_the_next_run(make_kernel, api, repo, server):
    root = make_kernel()
    publish(make(root), repo, api)
    before = {name: contents(api, repo, name) for name in ("main", "v1")}
    break_it(root)
    killed(root, repo, server)
    assert {name: contents(api, repo, name) for name in ("main", "v1")} != before
    with pytest.raises(PublishError, match=r"broken here.*v1 holds what .* main holds what"):
        release(make(root), repo, api)
    assert {name: contents(api, repo, name) for name in ("main", "v1")} == before


@pytest.mark.usefixtures("broken_for_consumers")
def test_a_bad_first_release_is_taken_back_by_the_next_run(make_kernel, api, repo, server):
    root = make_kernel()
    break_it(root)
    killed(root, repo, server)
    with pytest.raises(PublishError, match="v1, which was new, is removed again"):
        release(make(root), repo, api)
    assert branch_heads(api, repo).keys() == {"main"}


@pytest.mark.usefixtures("broken_for_consumers")
def test_what_another_machine_published_is_verified_but_never_taken_back(make_kernel, api, repo, tmp_path):
    root = make_kernel()
    break_it(root)
    publish(make(root), repo, api)  # by a machine whose notes are not here
    before = branch_heads(api, repo)
    with pytest.raises(PublishError, match=r"broken here.*not published by this run and stays"):
        release(make(root), repo, api)
    assert branch_heads(api, repo) == before


@pytest.mark.usefixtures("broken_for_consumers")
def test_a_branch_that_moved_on_since_is_left_alone(make_kernel, api, repo, server):
    root = make_kernel()
    publish(make(root), repo, api)
    break_it(root)
    killed(root, repo, server)
    note = [CommitOperationAdd("note.txt", b"theirs")]
    api.create_commit(repo, note, commit_message="x", repo_type="kernel", revision="v1")
    before = branch_heads(api, repo)
    with pytest.raises(PublishError, match="v1 was changed by somebody else since and is left alone"):
        release(make(root), repo, api)
    assert branch_heads(api, repo)["v1"] == before["v1"]


def test_restoring_leaves_alone_what_changes_in_that_very_moment(make_kernel, api, repo, monkeypatch):
    api.create_repo(repo, repo_type="kernel")

    def commit(path: str, data: bytes) -> str:
        add = [CommitOperationAdd(path, data)]
        return str(api.create_commit(repo, add, commit_message="x", repo_type="kernel").oid)

    before, bad = commit("a", b"1"), commit("a", b"bad")

    def looked(api: HfApi, repo_id: str) -> dict[str, str]:
        branches = branch_heads(api, repo_id)
        commit("b", b"another publisher")
        return branches

    monkeypatch.setattr(module, "branch_heads", looked)
    message = module._put_back(PublishedBranch("main", bad, True, 1, 0, "", before), before, repo, api)
    assert message == "main was changed by somebody else since and is left alone"
    assert "b" in contents(api, repo, "main")


def test_a_journal_is_kept_for_a_day_and_damage_to_it_is_no_matter(tmp_path, monkeypatch):
    journal = Journal.of("http://hub", "org/name", "hash")
    journal.changing("main", "before")
    (file,) = (tmp_path / "state/kernelpress/releases").iterdir()
    assert Journal.of("http://hub", "org/name", "hash").before == {"main": "before"}
    assert Journal.of("http://hub", "org/name", "other").before == {}
    os.utime(file, (1, 1))
    assert Journal.of("http://hub", "org/name", "hash").before == {}
    journal.verified(["a", "b"])
    assert Journal.of("http://hub", "org/name", "hash").has_verified(["a"])
    file.write_text("{")
    assert not Journal.of("http://hub", "org/name", "hash").has_verified(["a"])
