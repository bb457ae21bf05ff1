"""No web page of another site writes to a Hub or reads one on its reader's machine; every program does."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest
from huggingface_hub import HfApi
from localhub import RunningHub, create_token, running_hub
from localhub.http.context import Hub
from localhub.http.csrf import cross_site_reason
from localhub.http.problems import Problem
from localhub.store import Store
from localhub.tokens import Tokens
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


class Guarded(NamedTuple):
    hub: RunningHub
    token: str


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    root = tmp_path_factory.mktemp("guarded")
    token = create_token(root, "alice")
    with running_hub(root) as hub:
        HfApi(endpoint=hub.endpoint, token=token).create_repo("org/private", repo_type="kernel", private=True)
        HfApi(endpoint=hub.endpoint, token=token).create_repo("org/public", repo_type="kernel")
        yield Guarded(hub, token)


def test_with_a_token_the_page_does_not_matter(guarded: Guarded) -> None:
    headers = {
        "Authorization": f"Bearer {guarded.token}",
        "Origin": "https://hub.example.com",
        "Host": "hub.example.com",
    }
    assert create(guarded.hub, **headers).status_code == 200
    assert create(guarded.hub).status_code == 401


def password(token: str) -> str:
    return "Basic " + base64.b64encode(f"alice:{token}".encode()).decode()


@pytest.mark.parametrize("origin", ["https://example.com", None])
def test_a_password_that_a_browser_sends_by_itself_writes_nothing(
    guarded: Guarded, origin: str | None
) -> None:
    headers = {"Authorization": password(guarded.token)} | ({"Origin": origin} if origin else {})
    answer = create(guarded.hub, **headers)
    assert answer.status_code == 403
    assert "Bearer" in answer.json()["error"]
    body = b'{"key":"header","value":{"summary":"forged"}}'
    path = f"{guarded.hub.endpoint}/api/kernels/org/private/commit/main"
    assert (
        httpx2.post(path, content=body, headers={"Content-Type": "text/plain"} | headers).status_code == 403
    )
    # Reading is what git needs it for.
    page = httpx2.get(
        f"{guarded.hub.endpoint}/kernels/org/private", headers={"Authorization": headers["Authorization"]}
    )
    assert page.status_code == 200
    newest = httpx2.get(
        f"{guarded.hub.endpoint}/api/kernels/org/private/commits/main",
        headers={"Authorization": f"Bearer {guarded.token}"},
    ).json()
    assert [commit["title"] for commit in newest] == ["initial commit"]


BROWSER = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/140.0"}
NAVIGATION = BROWSER | {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
IMAGE = BROWSER | {"Accept": "image/avif,image/webp,image/png,*/*;q=0.8"}


@pytest.mark.parametrize(
    ("path", "headers", "asked"),
    [
        ("kernels/org/private", NAVIGATION, True),
        ("kernels/org/private", NAVIGATION | {"Sec-Fetch-Dest": "document"}, True),
        ("kernels/org/private/info/refs?service=git-upload-pack", {"User-Agent": "git/2.47.3"}, True),
        ("kernels/org/private/info/refs?service=git-upload-pack", {"User-Agent": "JGit/7"}, True),
        ("kernels/org/private/resolve/main/a.png", IMAGE, False),
        ("kernels/org/private/resolve/main/a.png", IMAGE | {"Sec-Fetch-Dest": "image"}, False),
        ("kernels/org/private/info/refs?service=git-upload-pack", IMAGE, False),
        ("kernels/org/private", NAVIGATION | {"Sec-Fetch-Dest": "iframe"}, False),
        ("api/kernels/org/private", {"User-Agent": "unknown/None; hf_hub/2.4.0"}, False),
    ],
)
def test_only_git_and_pages_that_are_opened_raise_a_password_prompt(
    guarded: Guarded, path: str, headers: dict[str, str], asked: bool
) -> None:
    answer = httpx2.get(f"{guarded.hub.endpoint}/{path}", headers=headers)
    assert answer.status_code == 401
    assert ("www-authenticate" in answer.headers) == asked


READS = [
    "api/kernels", "api/kernels/org/public", "api/kernels/org/public/tree/main", "kernels/org/public", "",
    "kernels/org/public/resolve/main/.gitattributes", "kernels/org/public/info/refs?service=git-upload-pack",
]  # fmt: skip


@pytest.mark.parametrize("path", READS)
def test_a_page_whose_name_was_made_to_lead_here_reads_nothing(guarded: Guarded, path: str) -> None:
    def status(**headers: str) -> int:
        return httpx2.get(f"{guarded.hub.endpoint}/{path}", headers=headers).status_code

    rebound = "rebound.example.com"
    assert status() == status(Host="localhost:1") == 200
    assert status(Host=rebound) == status(Host=rebound, Authorization=password(guarded.token)) == 403
    # A token shows that no browser sent this by itself: a proxy on this machine may pass any name on.
    assert status(Host=rebound, Authorization=f"Bearer {guarded.token}") == 200


def test_a_hub_that_others_reach_is_read_by_any_name(root: Path) -> None:
    # Asked of the rule itself: a test must not listen on an address that others can reach.
    request = Request({"type": "http", "scheme": "http", "headers": [(b"host", b"hub.example.com")]})
    Hub(Store(root), Tokens(root), frozenset(), open_writes=False).caller(request)
    local = Hub(Store(root), Tokens(root), frozenset(), open_writes=False, loopback=True)
    with pytest.raises(Problem, match="Host header names another machine"):
        local.caller(request)
