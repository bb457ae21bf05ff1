"""Repositories that somebody's own git wrote, or that are damaged: answers that say so, and ``fsck`` that finds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from dulwich.objects import Blob, Commit, ObjectID, ShaFile, Tree
from dulwich.refs import Ref
from dulwich.repo import Repo
from localhub import fsck
from localhub.http.app import create_app
from localhub.names import RepoId
from starlette.testclient import TestClient

BLOB = Blob.from_string(b"content")


def of(*entries: tuple[bytes, int, ObjectID]) -> Tree:
    tree = Tree()
    for entry in entries:
        tree.add(*entry)
    return tree


def deep(depth: int) -> list[ShaFile]:
    trees = [of((b"file", 0o100644, BLOB.id))]
    for _ in range(depth):
        trees.append(of((b"d", 0o040000, trees[-1].id)))
    return list(trees)


def missing_tree() -> list[ShaFile]:
    return [of((b"d", 0o040000, ObjectID(b"1" * 40)))]


UNNAMED = of((b"\xff", 0o100644, BLOB.id))
# The last object of each is the root.
TREES = {
    "a name that is not UTF-8": [of((b"caf\xe9", 0o100644, BLOB.id), (b"d", 0o040000, UNNAMED.id))],
    "a file for a folder": [of((b"d", 0o040000, BLOB.id))],
    "a folder for a file": [of((b"f", 0o100644, of().id))],
    "a folder that is missing": missing_tree(),
    "a file that is missing": [of((b"f", 0o100644, ObjectID(b"2" * 40)))],
    "great depth": deep(3000),
    "a file for the root": [BLOB],
}  # fmt: skip
FAULTS = {
    "a name that is not UTF-8": "not UTF-8",
    "a file for a folder": "is no tree",
    "a folder for a file": "is no blob",
    "a folder that is missing": "is missing",
    "a file that is missing": "is missing",
    "great depth": "more than 64 folders deep",
    "a file for the root": "is no tree",
}


def written(root: Path, objects: list[ShaFile]) -> TestClient:
    app = create_app(root, open_writes=True)
    repo = RepoId("kernel", "org", "k")
    app.state.hub.store.create(repo, private=False, author="a")
    with Repo(str(root / "repos/kernels/org/k.git")) as git:
        for obj in (BLOB, of(), UNNAMED, *objects):
            git.object_store.add_object(obj)
        commit = Commit()
        commit.tree, commit.message = objects[-1].id, b"made elsewhere"
        commit.author = commit.committer = b"a <a@b>"
        commit.author_time = commit.commit_time = commit.author_timezone = commit.commit_timezone = 0
        git.object_store.add_object(commit)
        git.refs[Ref(b"refs/heads/main")] = commit.id
        git.refs[Ref(b"refs/tags/blob")] = BLOB.id
    return TestClient(app, raise_server_exceptions=False, base_url="http://localhost")


@pytest.mark.parametrize("kind", TREES)
def test_a_tree_that_nobody_would_push_is_answered_and_found(root: Path, kind: str) -> None:
    client = written(root, TREES[kind])
    for path in (
        "api/kernels/org/k", "api/kernels/org/k?blobs=true", "api/kernels/org/k/tree/main",
        "api/kernels/org/k/tree/main?recursive=true&expand=true", "api/kernels/org/k/tree/main/d",
        "api/kernels/org/k/commits/main", "api/kernels/org/k/revision/blob", "api/kernels/org/k/refs",
        "kernels/org/k", "kernels/org/k/tree/main", "kernels/org/k/tree/main/d", "kernels/org/k/commit/main",
        "kernels/org/k/compare/main...main", "kernels/org/k/resolve/main/d", "kernels/org/k/resolve/main/f",
        "kernels/org/k/resolve/main/caf%E9", "kernels/org/k/resolve/blob/f", "api/kernels", "",
        "kernels/org/k/info/refs?service=git-upload-pack",
    ):  # fmt: skip
        answer = client.get(f"/{path}")
        assert answer.status_code < 500, (path, answer.text)
    body = '{"key":"header","value":{"summary":"s"}}\n{"key":"file","value":{"path":"d/x","content":"x"}}'
    assert client.post("/api/kernels/org/k/commit/main", content=body).status_code < 500
    faults = fsck(root).faults
    assert any(FAULTS[kind] in fault for fault in faults), faults


def test_a_sound_tree_has_no_faults(root: Path) -> None:
    client = written(root, deep(60))
    assert fsck(root).faults == ()
    answer = client.get("/api/kernels/org/k/tree/main?recursive=true")
    assert len(answer.json()) == 61
