"""Large files through git-lfs, with the real client and the real git."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from localhub import RunningHub, fsck
from localhub.errors import InvalidInput
from localhub.git.lfs_objects import LargeFile, LargeFiles

NewRepo = Callable[..., str]
SIZE = (64 << 20) + 12345

UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi(token=False).upload_file(path_or_fileobj=sys.argv[1], path_in_repo="big.bin", repo_id=sys.argv[2],
                               repo_type="kernel", commit_message="big")
"""


def upload(hub: RunningHub, repo: str, file: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", UPLOAD, str(file), repo],
        env=os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(file.parent / "home")} | environment,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big") / "big.bin"
    path.write_bytes(os.urandom(1 << 20) * 64 + b"x" * 12345)
    return path


def test_a_large_file_goes_in_and_out_whole_and_in_ranges(
    hub: RunningHub, api: HfApi, new_repo: NewRepo, big: Path, tmp_path: Path
) -> None:
    repo = new_repo()
    uploaded = upload(hub, repo, big, HF_HUB_DISABLE_XET="1")
    assert uploaded.returncode == 0, uploaded.stderr
    digest = hashlib.sha256(big.read_bytes()).hexdigest()
    [info] = api.get_paths_info(repo, ["big.bin"], repo_type="kernel")
    assert (info.size, info.lfs.sha256) == (SIZE, digest)  # type: ignore[union-attr]
    got = api.hf_hub_download(repo, "big.bin", repo_type="kernel", local_dir=tmp_path)
    assert hashlib.sha256(Path(got).read_bytes()).hexdigest() == digest
    address = f"{hub.endpoint}/kernels/{repo}/resolve/main/big.bin"
    part = httpx2.get(address, headers={"Range": f"bytes={SIZE - 7}-"})
    assert (part.status_code, part.content) == (206, b"x" * 7)
    assert part.headers["content-range"] == f"bytes {SIZE - 7}-{SIZE - 1}/{SIZE}"
    assert httpx2.get(address, headers={"If-None-Match": f'"{digest}"'}).status_code == 304
    assert fsck(hub.root).faults == ()


def test_a_client_that_would_use_xet_is_told_at_once_what_to_set(
    hub: RunningHub, new_repo: NewRepo, big: Path
) -> None:
    start = time.perf_counter()
    uploaded = upload(hub, new_repo(), big)
    assert uploaded.returncode != 0
    assert "HF_HUB_DISABLE_XET=1" in uploaded.stderr
    assert time.perf_counter() - start < 60


def announce(hub: RunningHub, repo: str, data: bytes, size: int | None = None) -> dict[str, str]:
    item = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data) if size is None else size}
    answer = httpx2.post(
        f"{hub.endpoint}/kernels/{repo}.git/info/lfs/objects/batch",
        json={"operation": "upload", "transfers": ["basic"], "objects": [item]},
    )
    action: dict[str, str] = answer.raise_for_status().json()["objects"][0]["actions"]["upload"]
    return action


def test_content_that_is_not_what_was_announced_is_refused(hub: RunningHub, new_repo: NewRepo) -> None:
    repo = new_repo()
    href = announce(hub, repo, b"what was announced")["href"]
    assert httpx2.put(href, content=b"what was AnnounceD").status_code == 400
    assert httpx2.put(href, content=b"short").status_code == 400
    assert httpx2.put(href, content=b"what was announced, and more").status_code == 413
    assert httpx2.put(href, content=b"what was announced").status_code == 200


def test_an_address_that_was_changed_or_belongs_to_another_repository_is_refused(
    hub: RunningHub, new_repo: NewRepo
) -> None:
    repo, other = new_repo(), new_repo()
    href = announce(hub, repo, b"mine")["href"]
    assert httpx2.put(href.replace(f"/{repo}/", f"/{other}/"), content=b"mine").status_code == 403
    assert httpx2.put(href.replace("/4/", "/5/"), content=b"mine!").status_code == 403
    assert httpx2.put(href[:-1] + "é", content=b"mine").status_code == 403


def test_parts_make_the_whole_in_any_order(
    hub: RunningHub, new_repo: NewRepo, api: HfApi, tmp_path: Path
) -> None:
    repo = new_repo()
    piece, count = os.urandom(64 << 20), 4
    digest = hashlib.sha256()
    for _ in range(count):
        digest.update(piece)
    digest.update(b"tail")
    item = {"oid": digest.hexdigest(), "size": count * len(piece) + 4}
    batch = {"operation": "upload", "transfers": ["basic", "multipart"], "objects": [item]}
    address = f"{hub.endpoint}/kernels/{repo}.git/info/lfs/objects/batch"
    action = httpx2.post(address, json=batch).json()["objects"][0]["actions"]["upload"]
    parts = {int(key): href for key, href in action["header"].items() if key.isdigit()}
    assert sorted(parts) == [1, 2, 3, 4, 5]
    assert httpx2.post(action["href"], json={}).status_code == 400
    for number in (5, 2, 1, 4, 3):
        answer = httpx2.put(parts[number], content=b"tail" if number == 5 else piece, timeout=60)
        assert answer.headers["etag"]
    assert httpx2.post(action["href"], json={}, timeout=60).status_code == 200
    assert "actions" not in httpx2.post(address, json=batch).json()["objects"][0]
    with open(f"/proc/{hub.pid}/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert peak < 600 << 10, "the Hub holds no large file in memory"


def test_a_pointer_to_content_that_is_not_here_is_served_as_the_text_it_is(
    hub: RunningHub, api: HfApi, new_repo: NewRepo, tmp_path: Path
) -> None:
    repo = new_repo()
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n".encode()
    api.upload_file(path_or_fileobj=text, path_in_repo="p", repo_id=repo, repo_type="kernel")
    got = api.hf_hub_download(repo, "p", repo_type="kernel", local_dir=tmp_path)
    assert Path(got).read_bytes() == text


def test_a_full_disk_is_said_and_leaves_everything_as_it_was(
    hub: RunningHub, api: HfApi, new_repo: NewRepo
) -> None:
    repo = new_repo()
    before = api.kernel_info(repo).sha
    noise = os.urandom(1 << 20)
    unlimited = resource.prlimit(hub.pid, resource.RLIMIT_FSIZE)
    # A file that may not grow fails like a disk that is full, in the same places.
    resource.prlimit(hub.pid, resource.RLIMIT_FSIZE, (256 << 10, unlimited[1]))
    try:
        with pytest.raises(HfHubHTTPError, match="disk is full"):
            api.upload_file(path_or_fileobj=noise, path_in_repo="x", repo_id=repo, repo_type="kernel")
        href = announce(hub, repo, noise)["href"]
        assert httpx2.put(href, content=noise).status_code == 507
    finally:
        resource.prlimit(hub.pid, resource.RLIMIT_FSIZE, unlimited)
    assert api.kernel_info(repo).sha == before
    assert fsck(hub.root).faults == ()
    api.upload_file(path_or_fileobj=noise, path_in_repo="x", repo_id=repo, repo_type="kernel")
    assert httpx2.put(href, content=noise).status_code == 200


def keep_large(hub: RunningHub, repo: str, data: bytes) -> str:
    httpx2.put(announce(hub, repo, data)["href"], content=data).raise_for_status()
    return hashlib.sha256(data).hexdigest()


def change(hub: RunningHub, repo: str, *operations: tuple[str, dict[str, str]], query: str = "") -> str:
    lines = [{"key": "header", "value": {"summary": "change"}}]
    lines += [{"key": key, "value": value} for key, value in operations]  # type: ignore[dict-item]
    body = "\n".join(json.dumps(line) for line in lines)
    answer = httpx2.post(f"{hub.endpoint}/api/kernels/{repo}/commit/main{query}", content=body)
    return str(answer.raise_for_status().json()["commitOid"])


def large(path: str, sha256: str) -> tuple[str, dict[str, str]]:
    return "lfsFile", {"path": path, "algo": "sha256", "oid": sha256}


def marked_in_a_clone(hub: RunningHub, repo: str, folder: Path, *paths: str) -> set[str]:
    """The paths that a clone gives to git-lfs."""
    quiet = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_LFS_SKIP_SMUDGE": "1"}
    subprocess.run(
        ["git", "clone", "-q", f"{hub.endpoint}/kernels/{repo}", str(folder)], env=quiet, check=True
    )
    command = ["git", "check-attr", "-z", "filter", "--", *paths]
    answer = subprocess.run(command, cwd=folder, env=quiet, capture_output=True, text=True, check=True)
    fields = answer.stdout.split("\0")
    return {path for path, value in zip(fields[::3], fields[2::3], strict=False) if value == "lfs"}


def test_git_lfs_fetches_each_large_file_of_a_clone(
    hub: RunningHub, new_repo: NewRepo, tmp_path: Path
) -> None:
    repo = new_repo()
    sha256 = keep_large(hub, repo, b"large")
    names = ("a.bin", "d/b [1].bin", "d/c.bin", "small")
    change(
        hub, repo, *(large(name, sha256) for name in names[:3]), ("file", {"path": "small", "content": "x"})
    )
    assert marked_in_a_clone(hub, repo, tmp_path / "1", *names) == set(names[:3])
    # Whoever writes the file, from an older copy for example, takes no line away.
    change(hub, repo, ("file", {"path": ".gitattributes", "content": "*.txt text\n"}))
    assert marked_in_a_clone(hub, repo, tmp_path / "2", *names) == set(names[:3])
    change(hub, repo, ("file", {"path": "a.bin", "content": "small now"}))
    assert marked_in_a_clone(hub, repo, tmp_path / "3", *names) == set(names[1:3])
    change(hub, repo, ("deletedFile", {"path": "d/b [1].bin"}), large("small", sha256))
    assert marked_in_a_clone(hub, repo, tmp_path / "4", *names) == {"d/c.bin", "small"}
    change(hub, repo, ("deletedFolder", {"path": "d/"}), ("deletedFile", {"path": "small"}))
    assert marked_in_a_clone(hub, repo, tmp_path / "5", *names) == set()
    assert (tmp_path / "5" / ".gitattributes").read_text() == "*.txt text\n"


def test_pull_requests_with_large_files_do_not_conflict_by_their_lines(
    hub: RunningHub, api: HfApi, new_repo: NewRepo, tmp_path: Path
) -> None:
    repo = new_repo()
    sha256 = keep_large(hub, repo, b"large")
    for name in ("a.bin", "b.bin"):
        change(hub, repo, large(name, sha256), query="?create_pr=1")
    for number in (1, 2):
        assert (
            httpx2.post(f"{hub.endpoint}/api/kernels/{repo}/discussions/{number}/merge", json={}).status_code
            == 200
        )
    assert marked_in_a_clone(hub, repo, tmp_path / "clone", "a.bin", "b.bin", "c.bin") == {"a.bin", "b.bin"}


def test_an_unchanged_large_file_is_not_committed_again(
    hub: RunningHub, api: HfApi, new_repo: NewRepo, big: Path
) -> None:
    repo = new_repo()
    for _ in range(3):
        uploaded = upload(hub, repo, big, HF_HUB_DISABLE_XET="1")
        assert uploaded.returncode == 0, uploaded.stderr
    titles = [commit.title for commit in api.list_repo_commits(repo, repo_type="kernel")]
    assert titles == ["big", "initial commit"]


def test_of_two_uploads_in_parts_of_one_file_both_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LargeFiles(tmp_path / "lfs")
    data = b"the same content"
    file = LargeFile(hashlib.sha256(data).hexdigest(), len(data))
    with pytest.raises(InvalidInput, match="no part"):
        store.keep_parts(file)
    store.parts(file).write_bytes(data)
    store.keep_parts(file)
    # The second one's parts: gone with the first, begun again, or taken while they are being read.
    store.keep_parts(file)
    store.parts(file).write_bytes(data[:3])
    store.keep_parts(file)
    assert not store.parts(file).exists()
    store.parts(file).write_bytes(data)
    keep = store.keep

    def overtaken(*arguments: Any) -> None:
        store.parts(file).unlink()
        keep(*arguments)

    monkeypatch.setattr(store, "keep", overtaken)
    store.keep_parts(file)
    assert store.path(file.sha256).read_bytes() == data
    monkeypatch.undo()
    other = LargeFile("0" * 64, 3)
    store.parts(other).write_bytes(b"abc")
    with pytest.raises(InvalidInput, match="not what was announced"):
        store.keep_parts(other)
