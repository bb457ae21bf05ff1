"""An open Hub takes no writes from web pages of other sites, and those of every program."""

from __future__ import annotations

import itertools

import httpx2
import pytest
from huggingface_hub import HfApi
from localhub import RunningHub, create_token, running_hub
from localhub.http.csrf import cross_site_reason
from starlette.requests import Request

_numbers = itertools.count()


def create(hub: RunningHub, **headers: str) -> httpx2.Response:
    # As a page can send it without asking first: a simple request, with a body that is JSON whatever it is called.
    body = f'{{"type": "kernel", "organization": "org", "name": "page-{next(_numbers)}"}}'
    kind = {"Content-Type": "text/plain"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.post(f"{hub.endpoint}/api/repos/create", content=body, headers=kind | named)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://example.com"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Host": "rebound.example.com"},
        {
            "Host": "rebound.example.com",
            "Origin": "http://rebound.example.com",
            "Sec_Fetch_Site": "same-origin",
        },
        {"Host": "127.0.0.1.example.com"},
        {"Host": "[::"},
    ],
)
def test_a_page_of_another_site_writes_nothing(hub: RunningHub, headers: dict[str, str]) -> None:
    answer = create(hub, **headers)
    assert answer.status_code == 403
    assert "other sites' pages" in answer.json()["error"]


def test_no_kind_of_write_is_left_open_to_pages(hub: RunningHub, api: HfApi, new_repo) -> None:  # type: ignore[no-untyped-def]
    repo = new_repo()
    before = [commit.commit_id for commit in api.list_repo_commits(repo, repo_type="kernel")]
    base = f"/api/kernels/{repo}"
    for method, path in (
        ("POST", f"{base}/commit/main"), ("POST", f"{base}/branch/v1"), ("POST", f"{base}/tag/main"),
        ("DELETE", f"{base}/branch/main"), ("PUT", f"{base}/settings"), ("POST", f"{base}/preupload/main"),
        ("POST", f"/kernels/{repo}.git/info/lfs/objects/batch"), ("DELETE", "/api/repos/delete"),
        ("POST", "/api/repos/move"),
    ):  # fmt: skip
        body = {
            "type": "kernel", "organization": "org", "name": repo[4:], "fromRepo": repo, "toRepo": "org/stolen",
            "operation": "upload", "objects": [{"oid": "a" * 64, "size": 1}], "transfers": ["basic"], "files": [],
        }  # fmt: skip
        answer = httpx2.request(
            method, hub.endpoint + path, json=body, headers={"Origin": "https://example.com"}
        )
        assert (path, answer.status_code) == (path, 403), answer.text
    assert [commit.commit_id for commit in api.list_repo_commits(repo, repo_type="kernel")] == before


@pytest.mark.parametrize("host", ["localhost:80", "hub.localhost", "127.0.0.1", "[::1]:80"])
def test_programs_and_the_hubs_own_pages_write(hub: RunningHub, host: str) -> None:
    assert create(hub).status_code == 200
    assert create(hub, Host=host).status_code == 200
    assert create(hub, Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin").status_code == 200


def test_the_name_that_the_hub_listens_on_is_its_own() -> None:
    request = Request({"type": "http", "scheme": "http", "headers": [(b"host", b"Hub.lan:8321")]})
    assert cross_site_reason(request, "hub.lan") is None
    assert cross_site_reason(request) is not None


def test_with_a_token_the_page_does_not_matter(tmp_path) -> None:  # type: ignore[no-untyped-def]
    token = create_token(tmp_path / "hub", "alice")
    with running_hub(tmp_path / "hub") as hub:
        headers = {
            "Authorization": f"Bearer {token}",
            "Origin": "https://hub.example.com",
            "Host": "hub.example.com",
        }
        assert create(hub, **headers).status_code == 200
        assert create(hub).status_code == 401
