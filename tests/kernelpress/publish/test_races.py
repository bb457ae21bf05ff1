"""Publishing while others publish, read or cut the connection."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from kernelpress.hub.client import RefusedError
from kernelpress.hub.client import hub as client
from kernelpress.publish.plan import plan
from kernelpress.publish.publish import publish
from sample_kernel import PACKAGE, commits, edit, files, heads, make

pytestmark = pytest.mark.usefixtures("no_settings_of_the_developers_own")


class Watched(HfApi):
    """The real client, which calls back before each step that changes the Hub."""

    before_step: Callable[[str], None] = staticmethod(lambda step: None)

    def create_branch(self, *args, **kwargs):
        self.before_step("create_branch")
        return super().create_branch(*args, **kwargs)

    def create_commit(self, *args, **kwargs):
        self.before_step("create_commit")
        return super().create_commit(*args, **kwargs)


def test_a_reader_of_a_new_version_never_sees_another_tree(make_kernel, server, repo):
    kernel = make(make_kernel())
    expected = {f"build/{variant.name}/{file.path}" for variant in kernel.variants for file in variant.files}
    api = Watched(endpoint=server.endpoint)
    trees = []

    def look(step: str) -> None:
        if "v1" in heads(api, repo):
            trees.append(expected <= files(api, repo, "v1"))

    api.before_step = look
    publish(kernel, repo, api)
    look("end")
    assert trees
    assert all(trees)


def interfering(api: Watched, interfere: Callable[[str], None]) -> None:
    """Let somebody else act once, just before the next step."""
    interruptions = [1]

    def act(step: str) -> None:
        if interruptions:
            interruptions.pop()
            interfere(step)

    api.before_step = act


@pytest.mark.parametrize("branch", ["v1", "main"])
def test_a_note_that_somebody_adds_meanwhile_is_kept(make_kernel, server, repo, branch):
    root = make_kernel()
    api, other = Watched(endpoint=server.endpoint), client(server.endpoint)
    publish(make(root), repo, api)
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 20")
    note = [CommitOperationAdd("note.md", b"theirs")]
    interfering(
        api,
        lambda step: other.create_commit(repo, note, commit_message="x", repo_type="kernel", revision=branch),
    )
    messages: list[str] = []
    published = publish(make(root), repo, api, say=messages.append)
    assert published.changed
    assert "meanwhile" in messages[0]
    assert "note.md" in files(other, repo, branch)
    assert plan(make(root), repo, other).unchanged


@pytest.mark.parametrize("branch", ["v1", "main"])
def test_another_build_published_meanwhile_is_not_overwritten(make_kernel, server, repo, branch):
    root = make_kernel()
    api, other = Watched(endpoint=server.endpoint), client(server.endpoint)
    publish(make(root), repo, api)
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", "FACTOR = 20")
    theirs = [CommitOperationAdd("build/torch-cpu/twice.py", b"theirs")]
    interfering(
        api,
        lambda step: other.create_commit(
            repo, theirs, commit_message="x", repo_type="kernel", revision=branch
        ),
    )
    with pytest.raises(RefusedError, match=f"somebody else changed {branch}") as caught:
        publish(make(root), repo, api)
    assert ("published before that: main" in str(caught.value)) == (branch == "v1")
    where = Path(api.hf_hub_download(repo, "build/torch-cpu/twice.py", repo_type="kernel", revision=branch))
    assert where.read_text() == "theirs"


def test_a_version_branch_made_by_somebody_else_meanwhile_is_built_upon(make_kernel, server, repo):
    api, other = Watched(endpoint=server.endpoint), client(server.endpoint)
    interfering(api, lambda step: other.create_branch(repo, branch="v1", repo_type="kernel"))
    publish(make(make_kernel()), repo, api)
    assert heads(api, repo).keys() == {"main", "v1"}
    assert plan(make(make_kernel()), repo, other).unchanged


def test_publishing_again_finishes_what_was_interrupted_at_any_step(make_kernel, server, tmp_path):
    kernel = make(make_kernel())
    expected = {f"build/{variant.name}/{file.path}" for variant in kernel.variants for file in variant.files}
    for stop_at in range(2):
        repo = f"org/interrupted-{stop_at}"
        api, steps = Watched(endpoint=server.endpoint), itertools.count()

        def stop(step: str, steps: Iterator[int] = steps, stop_at: int = stop_at) -> None:
            if next(steps) == stop_at:
                raise KeyboardInterrupt

        api.before_step = stop
        with pytest.raises(KeyboardInterrupt):
            publish(kernel, repo, api)
        for branch in heads(api, repo).keys() & {"v1"}:
            assert expected <= files(api, repo, branch)
        publish(kernel, repo, client(server.endpoint))
        assert heads(api, repo).keys() == {"main", "v1"}
        assert all(expected <= files(api, repo, branch) for branch in ("main", "v1"))


def test_publishers_at_once_never_mix_their_trees(make_kernel, api, repo, server, tmp_path):
    roots = []
    for number in range(3):
        root = make_kernel(f"at-once-{number}")
        edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", f"FACTOR = {number + 5}")
        (root / PACKAGE / f"only_{number}.py").write_text("")
        roots.append(root)
    publish(make(make_kernel()), repo, api)
    environment = os.environ | {"HF_ENDPOINT": server.endpoint}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "kernelpress", "publish", str(root), "--repo-id", repo],
            env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for root in roots
    ]  # fmt: skip
    messages = [process.communicate()[1] for process in processes]
    assert all(
        process.returncode == 0 or (process.returncode == 4 and "\nerror: somebody else" in f"\n{message}")
        for process, message in zip(processes, messages, strict=True)
    ), messages
    trees = [
        {f"build/{variant.name}/{file.path}" for variant in make(root).variants for file in variant.files}
        for root in roots
    ]
    for branch in ("v1", "main"):
        assert {path for path in files(api, repo, branch) if path.startswith("build/")} in trees


class Failing(HfApi):
    """The real client, with a connection that breaks at chosen steps: before the Hub hears, or before it answers."""

    plan: ClassVar[list[str]] = []

    def create_commit(self, *args, **kwargs):
        kind = self.plan.pop(0) if self.plan else ""
        if kind == "before":
            raise httpx2.ReadTimeout("cut off")
        commit = super().create_commit(*args, **kwargs)
        if kind == "after":
            raise httpx2.RemoteProtocolError("cut off")
        return commit


@pytest.mark.parametrize("kind", ["before", "after"])
def test_a_connection_cut_in_a_commit_is_tried_again_and_commits_once(make_kernel, server, repo, kind):
    api = Failing(endpoint=server.endpoint)
    api.create_repo(repo, repo_type="kernel")
    before = commits(api, repo, "main")
    api.plan = [kind]
    published = publish(make(make_kernel()), repo, api)
    assert [(branch.name, branch.changed) for branch in published.branches] == [("v1", True), ("main", True)]
    assert commits(api, repo, "main") == commits(api, repo, "v1") == before + 1
