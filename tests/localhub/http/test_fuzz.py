"""The Hub answers any request to any address of its own description, keeps running and stays whole."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from localhub import RunningHub, fsck

WORDS = [
    "kernels", "models", "datasets", "org", "fuzz", "other", "main", "v1", "refs/heads/main", "refs/pr/1", "HEAD",
    "..", ".", ".git", "a/../b", "%2e%2e", "\0", "é", "\ud800", "x" * 300, "0", "1", "-1", "9" * 30, "README.md",
    "build/torch-cpu/x.py", "v1...main", "put", "a" * 40, "0" * 64, "", " ", "?", "#", "{", "a:b", "~", "@{u}",
]  # fmt: skip
words = st.sampled_from(WORDS) | st.text(max_size=12)
keys = st.sampled_from([
    "name", "organization", "type", "private", "visibility", "gated", "fromRepo", "toRepo", "startingPoint", "tag",
    "message", "files", "path", "size", "sample", "gitIgnore", "operation", "objects", "oid", "transfers", "hash_algo",
    "status", "content", "key", "value", "summary", "parentCommit", "encoding",
])  # fmt: skip
values = st.recursive(
    words | st.none() | st.booleans() | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | words, inner, max_size=4),
    max_leaves=8,
)
operations = st.fixed_dictionaries(
    {"key": st.sampled_from(["header", "file", "lfsFile", "deletedFile", "deletedFolder"]) | words,
     "value": st.dictionaries(keys, values, max_size=4) | values}
)  # fmt: skip
HEADER = {"key": "header", "value": {"summary": "s"}}


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


bodies = (
    st.binary(max_size=60)
    | st.dictionaries(keys, values, max_size=6).map(encoded)
    | values.map(encoded)
    | st.lists(operations, max_size=4).map(lambda items: b"\n".join(map(encoded, [HEADER, *items])))
)
headers = st.dictionaries(
    st.sampled_from(["Range", "If-None-Match", "If-Range", "Authorization", "Content-Encoding", "Host", "Accept"]),
    st.sampled_from(["bytes=0-", "bytes=-5", "bytes=9-1", "*", '"x"', "Bearer x", "Basic %%", "gzip", "a b", ""]),
    max_size=2,
)  # fmt: skip
queries = st.dictionaries(
    st.sampled_from(["service", "recursive", "expand", "limit", "cursor", "p", "search", "author", "create_pr",
                     "include_prs", "blobs", "status", "sort", "type"]),
    st.sampled_from(["1", "true", "0", "-1", "x", "git-upload-pack", "git-receive-pack", "9" * 20, "closed"]),
    max_size=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def surface(hub: RunningHub, api: HfApi) -> list[tuple[str, str, list[str]]]:
    """Method, address and parameters of everything that the Hub describes."""
    api.create_repo("org/fuzz", repo_type="kernel")
    files = [CommitOperationAdd("README.md", b"# x"), CommitOperationAdd("build/torch-cpu/x.py", b"x")]
    api.create_commit("org/fuzz", files, commit_message="x", repo_type="kernel")
    api.create_branch("org/fuzz", branch="v1", repo_type="kernel")
    return described(hub.endpoint)


def test_the_description_names_the_whole_surface(surface: list[tuple[str, str, list[str]]]) -> None:
    assert (
        "POST",
        "/api/{kind}/{namespace}/{name}/commit/{ref}",
        ["kind", "namespace", "name", "ref"],
    ) in surface
    assert len(surface) > 60


def described(endpoint: str) -> list[tuple[str, str, list[str]]]:
    description: dict[str, Any] = httpx2.get(f"{endpoint}/api/openapi.json").json()
    assert description["openapi"].startswith("3.1")
    return [
        (method.upper(), path, [parameter["name"] for parameter in operation["parameters"]])
        for path, item in description["paths"].items()
        for method, operation in item.items()
    ]


def send_any(endpoint: str, surface: list[tuple[str, str, list[str]]], data: st.DataObject) -> None:
    method, path, names = data.draw(st.sampled_from(surface))
    likely = {"kind": "kernels", "namespace": "org", "name": "fuzz", "ref": "main"}
    for name in names:
        text = data.draw(st.just(likely[name]) | words if name in likely else words)
        path = path.replace(f"{{{name}}}", quote(text.encode("utf-8", "surrogatepass"), safe=""))
    body = data.draw(bodies) if method in ("POST", "PUT", "DELETE") else b""
    answer = httpx2.request(
        method,
        f"{endpoint}{path}",
        content=body,
        headers=data.draw(headers),
        params=data.draw(queries),
        timeout=60,
    )
    assert answer.status_code < 500, (method, path, body, answer.text)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_answer_is_a_success_a_redirect_or_a_reason(
    hub: RunningHub, surface: list[tuple[str, str, list[str]]], data: st.DataObject
) -> None:
    send_any(hub.endpoint, surface, data)


def test_a_mistake_in_the_hub_would_be_seen(broken_hub: str) -> None:
    # Of two hundred requests to all addresses, chance may send none to this one.
    surface = [route for route in described(broken_hub) if route[0] == "POST" and "/commit/" in route[1]]

    @seed(20261121)
    @settings(max_examples=50, deadline=None, database=None, phases=[Phase.generate])
    @given(st.data())
    def one(data: st.DataObject) -> None:
        send_any(broken_hub, surface, data)

    with pytest.raises(AssertionError, match="/commit/"):
        one()


def test_afterwards_the_hub_runs_and_is_whole(hub: RunningHub, surface: object) -> None:
    assert httpx2.get(f"{hub.endpoint}/healthz").status_code == 200
    assert fsck(hub.root).faults == ()
    assert "Traceback" not in hub.log.read_text()
