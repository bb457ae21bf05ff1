"""Garbage collection removes objects that nothing refers to, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from localhub import clean, fsck, running_hub
from localhub.errors import HubError
from localhub.git.lfs_objects import LargeFile, LargeFiles


def put_large(place: Path, data: bytes) -> LargeFile:
    file = LargeFile(hashlib.sha256(data).hexdigest(), len(data))
    large = LargeFiles(place / "lfs")
    with large.incoming() as received:
        received.write(data)
        large.keep(received, file.sha256, file)
    return file


def test_objects_of_deleted_branches_and_large_files_without_a_commit_go_and_all_else_stays(
    root: Path,
) -> None:
    place = root / "repos" / "kernels" / "org" / "demo.git"
    with running_hub(root) as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        api.create_repo("org/demo", repo_type="kernel")
        kept, lost = put_large(place, b"kept" * 9), put_large(place, b"lost" * 9)

        def commit(name: str, data: bytes, **options: object) -> None:
            files = [CommitOperationAdd(name, data)]
            api.create_commit("org/demo", files, commit_message="x", repo_type="kernel", **options)  # type: ignore[arg-type]

        commit("main.txt", b"main")
        commit("weights.bin", kept.pointer)
        commit("pull.txt", b"pull", create_pr=True)
        api.create_branch("org/demo", branch="v1", repo_type="kernel")
        commit("tagged.txt", b"tagged", revision="v1")
        api.create_tag("org/demo", tag="t", revision="v1", repo_type="kernel")
        commit("gone.txt", b"gone", revision="v1")
        api.delete_branch("org/demo", branch="v1", repo_type="kernel")
        with pytest.raises(HubError, match="another Hub"):
            clean(root)
    before = fsck(root)
    report = clean(root)
    # The commit, its tree and its file.
    assert (report.objects, report.large_files, report.faults) == (3, 1, ())
    assert report.bytes > lost.size
    assert LargeFiles(place / "lfs").has(kept)
    assert not LargeFiles(place / "lfs").has(lost)
    after = fsck(root)
    assert (after.faults, after.objects) == ((), before.objects)
    with running_hub(root) as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        for revision, name in [("main", "main.txt"), ("refs/pr/1", "pull.txt"), ("t", "tagged.txt")]:
            assert api.file_exists("org/demo", name, repo_type="kernel", revision=revision)
    assert (clean(root).objects, clean(root).large_files) == (0, 0)


def test_a_damaged_repository_is_left_alone(root: Path) -> None:
    with running_hub(root) as hub:
        HfApi(endpoint=hub.endpoint, token=False).create_repo("org/demo", repo_type="kernel")
    place = root / "repos" / "kernels" / "org" / "demo.git"
    objects = sorted(path for path in (place / "objects").glob("??/*"))
    objects[0].unlink()
    report = clean(root)
    assert "kernels/org/demo" in report.faults[0]
    assert sorted((place / "objects").glob("??/*")) == objects[1:]


def test_where_there_is_no_hub_nothing_is_done(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="no Hub here"):
        clean(tmp_path)
