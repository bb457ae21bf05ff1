"""Strangers cannot make the Hub hold much: bodies are read after permission, and files are sent piece by piece."""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from dulwich.objects import Blob
from huggingface_hub import HfApi
from localhub import RunningHub, create_token, running_hub
from localhub.git import objects
from localhub.git.repository import AddFile
from localhub.http.app import create_app
from localhub.names import RepoId
from localhub.store import Store
from starlette.routing import Route

NewRepo = Callable[..., str]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    root = tmp_path_factory.mktemp("guarded")
    token = create_token(root, "alice")
    with running_hub(root) as hub:
        HfApi(endpoint=hub.endpoint, token=token).create_repo("org/k", repo_type="kernel")
        yield hub


def with_bodies(root: Path) -> list[tuple[str, str]]:
    """Method and address of every route that takes a body, with an existing repository in it."""
    values = {"kind": "kernels", "namespace": "org", "name": "k", "ref": "main", "number": "1", "size": "9"}
    addresses = []
    for route in create_app(root).routes:
        if isinstance(route, Route):
            path = route.path
            for name, convertor in route.param_convertors.items():
                for form in (
                    f"{{{name}}}",
                    f"{{{name}:{type(convertor).__name__.removesuffix('Convertor').lower()}}}",
                ):
                    path = path.replace(form, values.get(name, "0" * 64))
            addresses += [(method, path) for method in (route.methods or set()) & {"POST", "PUT", "DELETE"}]
    return sorted(set(addresses))


@pytest.mark.parametrize("credentials", ["Authorization: Bearer nonsense\r\n", ""], ids=["nonsense", "none"])
def test_nothing_is_read_from_who_may_not_do_this(
    guarded: RunningHub, tmp_path: Path, credentials: str
) -> None:
    host, port = guarded.endpoint.removeprefix("http://").split(":")
    addresses = with_bodies(tmp_path)
    assert len(addresses) > 15
    for method, path in addresses:
        # Questions that anybody may ask about a public repository.
        question = path.endswith(("/validate-yaml", "/paths-info/main", "/git-upload-pack", "/objects/batch"))
        if question and not credentials:
            continue
        with socket.create_connection((host, int(port)), timeout=120) as connection:
            head = (
                f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8000000\r\n{credentials}\r\n"
            )
            connection.sendall(head.encode())
            # Not one byte of the body is sent, so an answer shows that none was waited for.
            status = int(connection.recv(1 << 16).split()[1])
        assert status in (401, 403, 404), (method, path, status)


def test_a_question_that_anybody_may_ask_is_short(guarded: RunningHub) -> None:
    long = "x" * (1 << 20)
    for path, body in (
        ("/api/validate-yaml", json.dumps({"content": long})),
        ("/api/kernels/org/k/paths-info/main", f"paths={long}"),
        ("/kernels/org/k.git/info/lfs/objects/batch", json.dumps({"operation": "download", "x": long})),
        ("/kernels/org/k/git-upload-pack", long * 2 + "x"),
    ):
        assert httpx2.post(guarded.endpoint + path, content=body, timeout=60).status_code == 413, path


def peak(hub: RunningHub) -> int:
    """Bytes that the Hub's process has used at most."""
    status = Path(f"/proc/{hub.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def test_slow_readers_of_a_file_do_not_hold_it_in_memory(root: Path) -> None:
    noise = os.urandom(1 << 20) * 48
    with running_hub(root) as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        api.create_repo("org/k", repo_type="kernel")
        api.upload_file(path_or_fileobj=noise, path_in_repo="f", repo_id="org/k", repo_type="kernel")
    # A new process, whose peak is not the upload's.
    with running_hub(root) as hub, ExitStack() as stack:
        host, port = hub.endpoint.removeprefix("http://").split(":")
        before = peak(hub)
        for _ in range(25):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=120))
            connection.sendall(b"GET /kernels/org/k/resolve/main/f HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(10) == b"HTTP/1.1 2"
        url = f"{hub.endpoint}/kernels/org/k/resolve/main/f"
        assert httpx2.get(url, timeout=120).content == noise
        part = httpx2.get(url, headers={"Range": "bytes=30000000-30000009"}, timeout=120)
        assert (part.status_code, part.content) == (206, noise[30000000:30000010])
        for page in ("/tree/main", "/commit/main"):
            assert httpx2.get(f"{hub.endpoint}/kernels/org/k{page}", timeout=120).status_code == 200
        assert peak(hub) - before < 60 << 20


@pytest.mark.parametrize("size", [0, 1, 5000, (1 << 20) + 1, 3 << 20])
def test_a_blob_is_read_in_pieces_as_it_is_written(
    root: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_CHUNK", 1000)
    store = Store(root)
    store.create(RepoId("kernel", "org", "k"), private=False, author="a")
    git = store.get(RepoId("kernel", "org", "k"))
    assert git is not None
    # Parts that shrink to almost nothing, and parts that do not shrink.
    data = (os.urandom(1500) + bytes(5000)) * (size // 6500 + 1)
    data = data[:size]
    with git.batch() as batch:
        oid = batch.add(Blob.from_string(data))
        git.commit("main", [AddFile("f", oid)], batch=batch, message="m", author="a")
    assert git.size(oid) == size
    assert git.head(oid, 10) == data[:10]
    path = git.path / "objects" / oid[:2] / oid[2:]
    for start, stop in itertools.combinations(sorted({0, 1, size // 3, size // 2, size}), 2):
        pieces = list(objects.read_loose_blob(path, start, stop))
        assert b"".join(pieces) == data[start:stop]
        assert max(map(len, pieces), default=0) <= 1000
