"""Branches, tags and pull requests move by compare-and-swap, and leave no lock behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from dulwich.file import _GitFile
from dulwich.objects import Blob
from localhub.errors import Conflict
from localhub.git import objects, refs
from localhub.git.repository import AddFile, ObjectBatch, Repository
from localhub.names import RepoId
from localhub.store import Store

ID = RepoId("kernel", "org", "k")


@pytest.fixture
def git(root: Path) -> Repository:
    store = Store(root)
    store.create(ID, private=False, author="a")
    repository = store.get(ID)
    assert repository is not None
    return repository


def commit(git: Repository, text: str, parent: str | None = None) -> str:
    with git.batch() as batch:
        blob = batch.add(Blob.from_string(text.encode()))
        return git.commit(
            "main", [AddFile(f"{text}.txt", blob)], batch=batch, message=text, author="a", parent=parent
        )


def command(folder: Path, *arguments: str) -> str:
    safe = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    answer = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env=os.environ | safe,
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout.strip()


def test_a_branch_that_somebodys_own_git_moves_in_between_loses_neither_commit(
    git: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = git.resolve("main")
    foreign = commit(git, "foreign")
    command(git.path, "update-ref", "refs/heads/main", first, foreign)
    publish = ObjectBatch.publish

    def publish_and_be_overtaken(batch: ObjectBatch) -> None:
        publish(batch)
        # Once: after the commit was built on the old head, and before the branch moves.
        if git.resolve("main") == first:
            command(git.path, "update-ref", "refs/heads/main", foreign, first)

    monkeypatch.setattr(ObjectBatch, "publish", publish_and_be_overtaken)
    ours = commit(git, "ours")
    assert git.resolve("main") == ours == command(git.path, "rev-parse", "main")
    assert git.commit_info(ours).parents == (foreign,)
    assert set(git.files(ours)) == {".gitattributes", "foreign.txt", "ours.txt"}


def changes(git: Repository) -> dict[str, Callable[[], object]]:
    def open_pull() -> object:
        with git.batch() as batch:
            return git.open_pull(git.resolve("main"), [], batch=batch, message="m", author="a")

    return {
        "commit": lambda: commit(git, "text"),
        "branch": lambda: git.create_branch("b", git.resolve("main")),
        "tag": lambda: git.create_tag("t", git.resolve("main"), "", "a"),
        "pull request": open_pull,
        "deletion": lambda: git.delete_branch("old"),
        "deletion of a packed ref": lambda: git.delete_branch("packed"),
    }


def all_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", ["commit", "branch", "tag", "pull request", "deletion of a packed ref"])
def test_an_error_while_a_ref_is_written_leaves_no_lock(
    git: Repository, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    git.create_branch("packed", git.resolve("main"))
    command(git.path, "pack-refs", "--all")
    before = git.branches(), git.tags(), git.pulls()

    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        # What is still in the buffer cannot be written when the lock is given up, either.
        patch.setattr(_GitFile, "close", full)
        patch.setattr(_GitFile, "abort", full)
        patch.delattr(_GitFile, "__del__")
        with pytest.raises(OSError, match="no space left"):
            changes(git)[change]()
    assert not [path for path in all_files(git.path) if path.endswith((".lock", ".new"))]
    if change != "deletion of a packed ref":
        assert (git.branches(), git.tags(), git.pulls()) == before
    commit(git, "again")


@pytest.mark.parametrize("change", ["commit", "branch", "tag", "pull request", "deletion"])
def test_a_lock_of_another_process_is_a_conflict_and_stays(
    git: Repository, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    git.create_branch("old", git.resolve("main"))
    monkeypatch.setattr(refs, "_LOCK_SECONDS", 0.0)
    names = {
        "commit": "heads/main",
        "branch": "heads/b",
        "tag": "tags/t",
        "pull request": "pr/1",
        "deletion": "heads/old",
    }
    lock = git.path / "refs" / f"{names[change]}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    with pytest.raises(Conflict, match="another git process holds the lock"):
        changes(git)[change]()
    assert lock.exists()


def test_settings_that_cannot_be_written_leave_nothing_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.replace_durably(tmp_path / "x.json", "old")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(objects, "sync", full)
    with pytest.raises(OSError, match="no space left"):
        objects.replace_durably(tmp_path / "x.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# Fills a file system of 8 MiB up to each number of free pages: space then runs out at each step of a commit.
FULL_DISK = """
import os, sys, errno
from pathlib import Path
sys.path[:0] = sys.argv[2].split(":")
from dulwich.objects import Blob
from localhub.git.repository import AddFile
from localhub.names import RepoId
from localhub.store import Store

root = Path(sys.argv[1])
store = Store(root / "hub")
store.create(RepoId("kernel", "org", "k"), private=False, author="a")
git = store.get(RepoId("kernel", "org", "k"))

def commit(text):
    with git.batch() as batch:
        blob = batch.add(Blob.from_string(text.encode()))
        return git.commit("main", [AddFile("f", blob)], batch=batch, message=text, author="a")

refused = 0
for pages in range(12):
    with open(root / "fill", "wb", buffering=0) as fill:
        try:
            while True:
                fill.write(bytes(4096))
        except OSError:
            fill.truncate(os.fstat(fill.fileno()).st_size - 4096 * pages)
    before = git.resolve("main")
    try:
        commit(f"full {pages}")
    except OSError as error:
        assert error.errno == errno.ENOSPC
        assert git.resolve("main") == before
        refused += 1
    os.unlink(root / "fill")
    assert not list(root.rglob("*.lock")), list(root.rglob("*.lock"))
    commit(f"room {pages}")
assert 0 < refused < 12, refused
"""


def test_a_disk_that_is_full_at_any_step_of_a_commit_locks_nothing(tmp_path: Path) -> None:
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    script = 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"'
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*mount, script, str(tmp_path), "true"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this machine lets nobody mount a small file system of his own")
    python = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path), ":".join(sys.path)]
    answer = subprocess.run(
        [*mount, script, str(tmp_path), *python], capture_output=True, text=True, check=False, timeout=600
    )
    assert answer.returncode == 0, answer.stderr
