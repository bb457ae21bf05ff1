"""Permission to read and to write: tokens and private repositories, with the real client."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RepositoryNotFoundError
from localhub import RunningHub, create_token, running_hub
from localhub.errors import HubError
from localhub.http.context import Caller, Hub
from localhub.http.problems import Problem
from localhub.store import Store
from localhub.tokens import Tokens
from starlette.requests import Request


class Guarded(NamedTuple):
    hub: RunningHub
    owner: HfApi
    reader: HfApi
    nobody: HfApi
    owner_token: str


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A Hub with a writer's and a reader's token, a public and a private repository."""
    root = tmp_path_factory.mktemp("guarded")
    writer, reader = create_token(root, "alice"), create_token(root, "bob", "read")
    with running_hub(root, trust=["org"]) as hub:
        owner = HfApi(endpoint=hub.endpoint, token=writer)
        owner.create_repo("org/public", repo_type="kernel")
        owner.create_repo("secretive/private", repo_type="kernel", private=True)
        owner.upload_file(
            path_or_fileobj=b"data", path_in_repo="f", repo_id="secretive/private", repo_type="kernel"
        )
        yield Guarded(
            hub,
            owner,
            HfApi(endpoint=hub.endpoint, token=reader),
            HfApi(endpoint=hub.endpoint, token=False),
            writer,
        )


def status_of(call: object, *arguments: object, **options: object) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return caught.value.response.status_code


def test_whoami_names_the_tokens_holder(guarded: Guarded) -> None:
    me = guarded.owner.whoami()
    assert me["name"] == "alice"
    assert me["auth"]["accessToken"]["role"] == "write"
    assert [item["name"] for item in me["orgs"]] == ["org", "secretive"]
    assert guarded.reader.whoami()["auth"]["accessToken"]["role"] == "read"
    assert httpx2.get(f"{guarded.hub.endpoint}/api/whoami-v2").status_code == 401


def test_commits_carry_the_tokens_name(guarded: Guarded) -> None:
    newest = guarded.owner.list_repo_commits("secretive/private", repo_type="kernel")[0]
    assert newest.authors == ["alice"]


@pytest.mark.parametrize(
    "path", ["api/kernels/org/public", "api/whoami-v2", "kernels/org/public/resolve/main/f"]
)
@pytest.mark.parametrize(
    "header", ["Bearer wrong", "Bearer", "Basic Zm9vOmJhcg==", "Basic ???", "Other x", ""]
)
def test_unknown_credentials_are_refused_even_where_none_are_needed(
    guarded: Guarded, path: str, header: str
) -> None:
    answer = httpx2.get(f"{guarded.hub.endpoint}/{path}", headers={"Authorization": header})
    assert answer.status_code == 401
    assert answer.headers["x-error-message"] == "Invalid credentials in Authorization header"


def test_unknown_token_is_refused_on_an_open_hub_too(hub: RunningHub) -> None:
    stranger = HfApi(endpoint=hub.endpoint, token="kp_wrong")
    assert status_of(stranger.create_repo, "org/x", repo_type="kernel") == 401
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        stranger.whoami()


def test_writing_without_a_token_is_refused_once_there_are_tokens(guarded: Guarded) -> None:
    assert guarded.nobody.kernel_info("org/public").id == "org/public"
    operation = [CommitOperationAdd("a", b"a")]
    with pytest.raises(HfHubHTTPError, match="kernelpress token create"):
        guarded.nobody.create_commit("org/public", operation, commit_message="m", repo_type="kernel")
    assert status_of(guarded.nobody.create_repo, "org/x", repo_type="kernel") == 401
    assert status_of(guarded.nobody.delete_repo, "org/public", repo_type="kernel") == 401
    assert status_of(guarded.nobody.create_branch, "org/public", branch="b", repo_type="kernel") == 401


def test_a_reading_token_does_not_write(guarded: Guarded) -> None:
    assert status_of(guarded.reader.create_repo, "org/x", repo_type="kernel") == 403
    assert status_of(guarded.reader.create_tag, "org/public", tag="t", repo_type="kernel") == 403
    assert status_of(guarded.reader.delete_repo, "org/public", repo_type="kernel") == 403


def test_private_repository_opens_to_tokens_only(guarded: Guarded, tmp_path: Path) -> None:
    for api in (guarded.owner, guarded.reader):
        file = api.hf_hub_download("secretive/private", "f", repo_type="kernel", cache_dir=tmp_path)
        assert Path(file).read_bytes() == b"data"
        assert api.kernel_info("secretive/private").private is True
    with pytest.raises(RepositoryNotFoundError):
        guarded.nobody.kernel_info("secretive/private")
    with pytest.raises(RepositoryNotFoundError):
        guarded.nobody.hf_hub_download(
            "secretive/private", "f", repo_type="kernel", cache_dir=tmp_path / "empty"
        )


@pytest.mark.parametrize(
    "path",
    [
        "api/kernels/secretive/{}",
        "api/kernels/secretive/{}/refs",
        "api/kernels/secretive/{}/tree/main",
        "api/kernels/secretive/{}/commits/main",
        "kernels/secretive/{}/resolve/main/f",
        "kernels/secretive/{}/info/refs?service=git-upload-pack",
        "kernels/secretive/{}/info/refs?service=git-receive-pack",
    ],
)
def test_private_and_missing_repositories_look_the_same_without_a_token(guarded: Guarded, path: str) -> None:
    answers = [httpx2.get(f"{guarded.hub.endpoint}/{path.format(name)}") for name in ("private", "missing")]
    assert answers[0].status_code == 401
    assert answers[0].status_code == answers[1].status_code
    assert answers[0].text.replace("private", "missing") == answers[1].text
    assert httpx2.get(f"{guarded.hub.endpoint}/api/kernels").text.count("secretive") == 0
    assert httpx2.get(f"{guarded.hub.endpoint}/api/organizations/secretive/overview").status_code == 404


def test_visibility_can_be_changed(guarded: Guarded) -> None:
    # A model: the client changes settings of no other kind that this Hub serves.
    guarded.owner.create_repo("org/turncoat")
    guarded.owner.update_repo_settings("org/turncoat", private=True)
    with pytest.raises(RepositoryNotFoundError):
        guarded.nobody.model_info("org/turncoat")
    guarded.owner.update_repo_settings("org/turncoat", visibility="public")
    assert guarded.nobody.model_info("org/turncoat").private is False


def test_git_clones_a_private_repository_with_the_token_as_password(guarded: Guarded, tmp_path: Path) -> None:
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_GLOBAL": os.devnull}
    host = guarded.hub.endpoint.removeprefix("http://")
    for user, expected in ((f"alice:{guarded.owner_token}@", 0), ("", 128), ("alice:wrong@", 128)):
        target = tmp_path / str(expected) / user.replace(":", "_")
        command = ["git", "clone", f"http://{user}{host}/kernels/secretive/private", str(target)]
        assert subprocess.run(command, env=quiet, capture_output=True, timeout=600).returncode == expected


def test_a_private_repository_on_a_hub_without_tokens_is_refused(api: HfApi) -> None:
    with pytest.raises(BadRequestError, match="a private repository needs a token"):
        api.create_repo("org/unreadable", repo_type="kernel", private=True)


def test_owner_defaults_to_the_tokens_holder(guarded: Guarded, api: HfApi) -> None:
    assert guarded.owner.create_repo("mine", repo_type="kernel").repo_id == "alice/mine"
    with pytest.raises(BadRequestError, match="name the owner too"):
        api.create_repo("mine", repo_type="kernel")


def test_a_token_made_while_the_hub_runs_works_at_once(root: Path) -> None:
    with running_hub(root) as hub:
        nobody = HfApi(endpoint=hub.endpoint, token=False)
        nobody.create_repo("org/open", repo_type="kernel")
        late = HfApi(endpoint=hub.endpoint, token=create_token(root, "carol"))
        assert late.whoami()["name"] == "carol"
        assert status_of(nobody.create_repo, "org/closed", repo_type="kernel") == 401


LOCAL = Request({"type": "http", "scheme": "http", "headers": [(b"host", b"127.0.0.1:1")]})


def test_a_hub_that_others_can_reach_takes_no_write_without_a_token(root: Path) -> None:
    # Asked of the rule itself: a test must not listen on an address that others can reach.
    hub = Hub(Store(root), Tokens(root), frozenset(), open_writes=False)
    with pytest.raises(Problem, match="takes writes only with a token") as caught:
        hub.require_write(LOCAL, Caller(None), "org")
    assert caught.value.status == 401
    Hub(hub.store, hub.tokens, frozenset(), open_writes=True).require_write(LOCAL, Caller(None), "org")


def test_tokens_are_hashed_at_rest(root: Path) -> None:
    secrets = [create_token(root, "alice"), create_token(root, "bob", "read")]
    stored = (root / "tokens.json").read_text()
    assert [item["name"] for item in json.loads(stored)["tokens"]] == ["alice", "bob"]
    assert not any(secret in stored or secret[3:] in stored for secret in secrets)
    assert stat.S_IMODE((root / "tokens.json").stat().st_mode) == 0o600


def test_bad_tokens_are_refused_with_a_reason(root: Path) -> None:
    with pytest.raises(HubError, match="no valid token name"):
        create_token(root, "a/b")
    with pytest.raises(HubError, match="'admin' is no token scope"):
        create_token(root, "a", "admin")  # type: ignore[arg-type]
    assert not root.exists()


def test_a_damaged_token_file_stops_the_hub_from_starting(root: Path) -> None:
    root.mkdir()
    (root / "tokens.json").write_text("{")
    with pytest.raises(HubError, match="the token file is damaged"), running_hub(root):
        pass


def test_a_token_file_damaged_later_locks_everyone_out(root: Path) -> None:
    owner_token = create_token(root, "alice")
    with running_hub(root) as hub:
        (root / "tokens.json").write_text("{")
        headers = {"Authorization": f"Bearer {owner_token}"}
        assert httpx2.get(f"{hub.endpoint}/api/whoami-v2", headers=headers).status_code == 503
        nobody = HfApi(endpoint=hub.endpoint, token=False)
        assert status_of(nobody.create_repo, "org/x", repo_type="kernel") == 503


def test_without_open_even_loopback_writes_need_a_token(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "localhub", "--root", str(tmp_path / "hub")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            endpoint = process.stdout.readline().split()[3]
            with pytest.raises(HfHubHTTPError, match="only with a token"):
                HfApi(endpoint=endpoint, token=False).create_repo("org/k", repo_type="kernel")
            token = create_token(tmp_path / "hub", "me")
            HfApi(endpoint=endpoint, token=token).create_repo("org/k", repo_type="kernel")
        finally:
            process.terminate()
