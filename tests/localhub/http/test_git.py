"""The real git command against the embedded Hub."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import uvicorn
from dulwich.protocol import Protocol, pkt_line
from dulwich.repo import Repo
from dulwich.server import UploadPackHandler
from huggingface_hub import CommitOperationAdd, HfApi
from localhub import RunningHub
from localhub.http.app import create_app
from localhub.http.git import without_repeats
from localhub.names import RepoId
from starlette.testclient import TestClient


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


def fetch_body(oid: str, repeats: int, capabilities: str = "side-band-64k thin-pack ofs-delta") -> bytes:
    lines = [f"want {oid} {capabilities}\n", *[f"want {oid}\n"] * (repeats - 1)]
    return b"".join(pkt_line(line.encode()) for line in lines) + b"0000" + pkt_line(b"done\n")


def test_an_object_that_is_wanted_many_times_is_sent_like_one_that_is_wanted_once(
    hub: RunningHub, api: HfApi, repo: str
) -> None:
    oid = str(api.kernel_info(repo).sha)
    # What is named once costs what a fetch costs, so it is this that has to hold.
    assert without_repeats(fetch_body(oid, 12_000)) == fetch_body(oid, 1)
    haves = b"".join(pkt_line(f"have {number:040x}\n".encode()) for number in (1, 2, 1)) + b"0000"
    assert without_repeats(haves) == haves[: 2 * 50] + b"0000"
    url = f"{hub.endpoint}/kernels/{repo}/git-upload-pack"
    once = httpx2.post(url, content=fetch_body(oid, 1))
    often = httpx2.post(
        url, content=gzip.compress(fetch_body(oid, 12_000)), headers={"Content-Encoding": "gzip"}, timeout=60
    )
    assert once.status_code == often.status_code == 200
    assert len(once.content) == len(often.content) > 100


def test_more_objects_than_any_git_names_at_once_are_refused(hub: RunningHub, repo: str) -> None:
    for verb in ("want", "have", "shallow"):
        body = b"".join(pkt_line(f"{verb} {number:040x}\n".encode()) for number in range((1 << 15) + 1))
        answer = httpx2.post(f"{hub.endpoint}/kernels/{repo}/git-upload-pack", content=body, timeout=60)
        assert answer.status_code == 413, verb


def test_a_client_that_takes_no_thin_packs_is_served(
    hub: RunningHub, api: HfApi, repo: str, tmp_path: Path
) -> None:
    oid = str(api.kernel_info(repo).sha)
    body = fetch_body(oid, 1, "side-band-64k ofs-delta")
    answer = httpx2.post(f"{hub.endpoint}/kernels/{repo}/git-upload-pack", content=body)
    assert answer.status_code == 200
    protocol = Protocol(io.BytesIO(answer.content).read, lambda data: None)
    packets = [packet for packet in iter(protocol.read_pkt_line, None) if packet[:1] == b"\1"]
    git("init", "--bare", str(tmp_path / "bare"))
    unpacked = subprocess.run(
        ["git", "unpack-objects", "--strict"],
        cwd=tmp_path / "bare",
        input=b"".join(packet[1:] for packet in packets),
        capture_output=True,
    )
    assert unpacked.returncode == 0, unpacked.stderr
    assert git("cat-file", "-t", oid, cwd=tmp_path / "bare").stdout == "commit\n"


def test_fetches_that_take_long_keep_nobody_else_waiting(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = threading.Event()
    handle = UploadPackHandler.handle
    running: list[object] = []

    def wait(handler: UploadPackHandler) -> None:
        running.append(handler)
        assert finish.wait(120)
        handle(handler)

    monkeypatch.setattr(UploadPackHandler, "handle", wait)
    server = uvicorn.Server(uvicorn.Config(create_app(root, open_writes=True), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    endpoint = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    api = HfApi(endpoint=endpoint, token=False)
    api.create_repo("org/k", repo_type="kernel")
    url = f"{endpoint}/kernels/org/k/info/refs?service=git-upload-pack"
    with ThreadPoolExecutor(60) as pool:
        # More than the threads that everything else has.
        fetches = [pool.submit(httpx2.get, url, timeout=120) for _ in range(60)]
        try:
            assert api.kernel_info("org/k").id == "org/k"
            assert len(running) <= 2
        finally:
            finish.set()
        assert {fetch.result().status_code for fetch in fetches} == {200}
    server.should_exit = True
    thread.join(60)


def test_the_advertisement_survives_branches_that_go_while_it_is_made(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = iter([True, True])
    original = Repo.get_refs

    def get_refs(repository: Repo) -> object:
        if next(gone, False):
            raise KeyError(b"refs/heads/gone")
        return original(repository)

    monkeypatch.setattr(Repo, "get_refs", get_refs)
    app = create_app(root, open_writes=True)
    app.state.hub.store.create(RepoId("kernel", "org", "k"), private=False, author="a")
    with TestClient(app) as client:
        answer = client.get("/kernels/org/k/info/refs?service=git-upload-pack")
    assert answer.status_code == 200
    assert b"refs/heads/main" in answer.content
