"""Large files through git-lfs, with the real client and the real git."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from localhub import RunningHub, fsck

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
