"""Details that clients of the Hugging Face Hub rely on."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)
from localhub import RunningHub, create_token, revoke_tokens, running_hub

NewRepo = Callable[..., str]


@pytest.mark.parametrize("kind", ["model", "kernel"])
def test_an_id_without_a_namespace_is_not_found(api: HfApi, kind: str, tmp_path: Path) -> None:
    assert api.repo_exists("gpt2", repo_type=kind) is False
    assert api.revision_exists("gpt2", "main", repo_type=kind) is False
    assert api.file_exists("gpt2", "config.json", repo_type=kind) is False
    with pytest.raises(RepositoryNotFoundError):
        api.list_repo_commits("gpt2", repo_type=kind)
    with pytest.raises(RepositoryNotFoundError):
        list(api.list_repo_tree("gpt2", repo_type=kind))
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("gpt2", "config.json", repo_type=kind, cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"", path_in_repo="f", repo_id="gpt2", repo_type=kind)
    with pytest.raises(RepositoryNotFoundError):
        api.update_repo_settings("gpt2", gated="auto", repo_type="model")


@pytest.mark.parametrize("path", ["api/models/org/k/unknown", "api/spaces/x", "org/k/unknown/x"])
def test_what_is_no_repositorys_address_is_not_taken_for_one(hub: RunningHub, path: str) -> None:
    answer = httpx2.get(f"{hub.endpoint}/{path}")
    assert (answer.status_code, "does not implement" in answer.json()["error"]) == (404, True)


def test_every_answer_names_its_request(hub: RunningHub, broken_hub: str) -> None:
    ids = []
    for address in (
        f"{hub.endpoint}/healthz",
        f"{hub.endpoint}/nothing/here/at/all",
        f"{hub.endpoint}/api/kernels",
    ):
        ids += [httpx2.get(address).headers["x-request-id"] for _ in range(2)]
        sent = httpx2.get(address, headers={"X-Amzn-Trace-Id": "a trace", "X-Request-Id": "mine-1"})
        assert sent.headers["x-request-id"] == "mine-1"
        assert (
            "trace-7" in httpx2.get(address, headers={"X-Amzn-Trace-Id": "trace-7"}).headers["x-request-id"]
        )
    assert len(set(ids)) == len(ids)
    httpx2.post(f"{broken_hub}/api/repos/create", json={"name": "k", "organization": "org"})
    crash = httpx2.post(f"{broken_hub}/api/models/org/k/commit/main", headers={"X-Request-Id": "crash-1"})
    assert (crash.status_code, crash.headers["x-request-id"]) == (500, "crash-1")
    # The id is the caller's text: none that breaks a log's line comes back.
    odd = httpx2.get(f"{hub.endpoint}/healthz", headers={"X-Request-Id": "a b"}).headers["x-request-id"]
    assert odd != "a b"


class Tokens:
    def __init__(self, root: Path) -> None:
        self.owner, self.reader = create_token(root, "alice"), create_token(root, "bob", "read")


@pytest.fixture
def guarded(root: Path) -> Iterator[tuple[RunningHub, Tokens]]:
    tokens = Tokens(root)
    with running_hub(root) as hub:
        yield hub, tokens


def test_access_is_checked_before_anything_is_sent(guarded: tuple[RunningHub, Tokens]) -> None:
    hub, tokens = guarded
    owner, reader = (HfApi(endpoint=hub.endpoint, token=token) for token in (tokens.owner, tokens.reader))
    nobody = HfApi(endpoint=hub.endpoint, token=False)
    owner.create_repo("org/open")
    owner.create_repo("org/gated")
    owner.update_repo_settings("org/gated", gated="auto")
    for api in (owner, reader, nobody):
        api.auth_check("org/open")
    owner.auth_check("org/open", write=True)
    with pytest.raises(HfHubHTTPError, match="only allows reading"):
        reader.auth_check("org/open", write=True)
    with pytest.raises(GatedRepoError):
        nobody.auth_check("org/gated")
    reader.auth_check("org/gated")
    with pytest.raises(RepositoryNotFoundError):
        owner.auth_check("org/none")


def test_ids_differ_by_more_than_capitals(hub: RunningHub, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("Org/CaSe", repo_type="kernel")
    api.upload_file(path_or_fileobj=b"1", path_in_repo="f", repo_id="org/case", repo_type="kernel")
    assert api.kernel_info("ORG/case").id == "Org/CaSe"
    file = api.hf_hub_download("org/CASE", "f", repo_type="kernel", cache_dir=tmp_path)
    assert Path(file).read_bytes() == b"1"
    url = api.create_repo("org/case", repo_type="kernel", exist_ok=True)
    assert api.kernel_info(url.repo_id).id == "Org/CaSe"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("org/case", repo_type="kernel")
    api.create_repo("org/other", repo_type="model")
    api.create_repo("org/mover")
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.move_repo("org/mover", "ORG/Other")
    # Its own capitals may change.
    api.move_repo("org/other", "org/Other")
    assert api.model_info("org/other").id == "org/Other"


@pytest.mark.parametrize("kind", ["model", "kernel"])
@pytest.mark.parametrize("branch", ["resolve", "raw", "tree", "commits", "main2"])
def test_a_branch_of_any_name_can_be_downloaded(
    hub: RunningHub, api: HfApi, kind: str, branch: str, tmp_path: Path
) -> None:
    repo = f"org/branches-{kind}"
    api.create_repo(repo, repo_type=kind, exist_ok=True)
    api.create_branch(repo, branch=branch, repo_type=kind)
    api.upload_file(
        path_or_fileobj=branch.encode(), path_in_repo="f", repo_id=repo, repo_type=kind, revision=branch
    )
    file = api.hf_hub_download(repo, "f", revision=branch, repo_type=kind, cache_dir=tmp_path)
    assert Path(file).read_text() == branch


def test_every_file_that_is_taken_can_be_downloaded(api: HfApi, new_repo: NewRepo, tmp_path: Path) -> None:
    repo = new_repo()
    names = [
        "a b",
        "a?b",
        "a#b",
        "a%2Fb",
        "a*b",
        "a&b=c;d",
        "a+b",
        "~",
        "a@b",
        "é",
        "d/[x]",
        "a'b\"c",
        "<x>",
        "a|b",
        "$",
        "a b:c",
        "to?/awful?name%you:should,never.give",
    ]
    operations = [CommitOperationAdd(name, name.encode()) for name in names]
    api.create_commit(repo, operations, commit_message="names", repo_type="kernel")
    folder = Path(api.snapshot_download(repo, repo_type="kernel", cache_dir=tmp_path))
    assert {name: (folder / name).read_text() for name in names} == {name: name for name in names}
    for name in ("a:b", "d/c:", "1:/x"):
        with pytest.raises(BadRequestError, match="drive of Windows"):
            api.upload_file(path_or_fileobj=b"", path_in_repo=name, repo_id=repo, repo_type="kernel")


def test_a_request_with_two_lengths_is_refused_and_the_connection_closed(hub: RunningHub) -> None:
    host, port = hub.endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(
            b"POST /api/repos/create HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        answers = b""
        while data := connection.recv(1 << 16):
            answers += data
    assert answers.startswith(b"HTTP/1.1 400 ")
    assert answers.count(b"HTTP/1.1") == 1


def test_an_address_lasts_no_longer_than_the_token_it_was_given_to(
    guarded: tuple[RunningHub, Tokens],
) -> None:
    hub, tokens = guarded
    api = HfApi(endpoint=hub.endpoint, token=tokens.owner)
    api.create_repo("org/k", repo_type="kernel")
    sha256 = "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0"  # of "aaa"
    batch = f"{hub.endpoint}/kernels/org/k.git/info/lfs/objects/batch"

    def action(token: str | None, operation: str, oid: str = sha256) -> str:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        body = {"operation": operation, "objects": [{"oid": oid, "size": 3}]}
        answer = httpx2.post(batch, json=body, headers=headers).raise_for_status().json()
        return str(answer["objects"][0]["actions"][operation]["href"])

    upload, other = action(tokens.owner, "upload"), action(tokens.owner, "upload", "0" * 64)
    assert httpx2.put(upload, content=b"aaa").status_code == 200
    mine, readers, anybodys = (action(token, "download") for token in (tokens.owner, tokens.reader, None))
    assert {httpx2.get(address).text for address in (mine, readers, anybodys)} == {"aaa"}
    owner = {"Authorization": f"Bearer {tokens.owner}"}
    settings = f"{hub.endpoint}/api/kernels/org/k/settings"
    httpx2.put(settings, json={"private": True}, headers=owner).raise_for_status()
    assert httpx2.get(anybodys).status_code == 401
    assert httpx2.get(mine).text == httpx2.get(readers).text == "aaa"
    revoke_tokens(hub.root, "alice")
    assert httpx2.get(mine).status_code == 403
    assert httpx2.put(other, content=b"aaa").status_code == 403
    assert httpx2.get(readers).text == "aaa"


def test_an_upload_address_of_an_open_hub_ends_with_its_openness(root: Path) -> None:
    with running_hub(root) as hub:
        HfApi(endpoint=hub.endpoint, token=False).create_repo("org/k", repo_type="kernel")
        body = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 3}]}
        answer = httpx2.post(f"{hub.endpoint}/kernels/org/k.git/info/lfs/objects/batch", json=body).json()
        address = answer["objects"][0]["actions"]["upload"]["href"]
        assert httpx2.put(address, content=b"aaa").status_code == 400
        create_token(root, "alice")
        assert httpx2.put(address, content=b"aaa").status_code == 401


def test_other_users_of_the_machine_read_no_repository(hub: RunningHub, new_repo: NewRepo) -> None:
    new_repo()
    for folder in (hub.root / "repos", hub.root / "tmp"):
        assert folder.stat().st_mode & 0o077 == 0


def test_a_verbose_hub_logs_requests_and_another_none(tmp_path: Path) -> None:
    for options, logged in (([], False), (["--verbose"], True)):
        command = [
            sys.executable,
            "-m",
            "kernelpress",
            "serve",
            "--root",
            str(tmp_path / "hub"),
            "--port",
            "0",
        ]
        with subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            endpoint = process.stdout.readline().split()[3]
            assert httpx2.get(f"{endpoint}/healthz").status_code == 200
            process.terminate()
            _, log = process.communicate(timeout=60)
        assert ('"GET /healthz HTTP/1.1" 200' in log) == logged
