"""Bad input is answered by a 4xx with a reason, changes nothing, and leaves the Hub running."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from urllib.parse import quote

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from localhub import RunningHub

HEADER = {"key": "header", "value": {"summary": "s"}}
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def client(hub: RunningHub, api: HfApi) -> Iterator[httpx2.Client]:
    api.create_repo("org/target", repo_type="kernel")
    api.create_commit(
        "org/target", [CommitOperationAdd("a.txt", b"a"), CommitOperationAdd("d/b.txt", b"b")],
        commit_message="m", repo_type="kernel",
    )  # fmt: skip
    with httpx2.Client(base_url=hub.endpoint, timeout=60) as client:
        yield client


@pytest.fixture
def unchanged(api: HfApi, client: httpx2.Client) -> Iterator[None]:
    """The target repository is the same after the test, and the Hub answers."""
    before = api.list_repo_refs("org/target", repo_type="kernel")
    yield
    assert api.list_repo_refs("org/target", repo_type="kernel") == before


def ndjson(*items: object) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def file(path: object, content: object = "eA==", encoding: object = "base64") -> dict[str, object]:
    return {"key": "file", "value": {"path": path, "content": content, "encoding": encoding}}


def post_commit(client: httpx2.Client, body: bytes) -> httpx2.Response:
    return client.post("/api/kernels/org/target/commit/main", content=body)


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "../x", "a/../b", "a/./b", "/etc/passwd", "a//b", "a/", "a\\b", "..\\x", "C:\\x",
        "a\x00b", "a\nb", "a\x7fb", ".git/config", "a/.git/hooks/x", ".GIT/config", ".Git", "git~1/x",
        ".git./x", ".git /x", ".git::$INDEX_ALLOCATION/x", ".g\u200cit/x", "x" * 256, "x/" * 64 + "y",
        "/".join(["x" * 200] * 6), "\ud800", 7, None, ["a"], {"a": 1}, True,
    ],
)  # fmt: skip
def test_a_path_that_leaves_the_repository_or_cannot_be_checked_out_is_refused(
    client: httpx2.Client, unchanged: None, path: object
) -> None:
    for key in ("file", "deletedFile", "deletedFolder"):
        item = file(path) if key == "file" else {"key": key, "value": {"path": path}}
        if key == "deletedFolder" and path == "a/":
            continue
        answer = post_commit(client, ndjson(HEADER, item))
        assert answer.status_code == 400
        assert answer.json()["error"].startswith("commit line 2: ")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the commit is empty"),
        (b"\n\n", "the commit is empty"),
        (b"{", "commit line 1: not valid JSON"),
        (b"\xff\xfe", "commit line 1: not valid JSON"),
        (b"[" * 100_000, "commit line 1: not valid JSON"),
        (b'{"a":' * 100_000, "commit line 1: not valid JSON"),
        (b"1" * 10_000, "commit line 1: "),
        (b"[]", "commit line 1: expected"),
        (b'{"key": 1}', "commit line 1: expected"),
        (b'{"key": "header"}', '"value" must be an object'),
        (ndjson(file("a")), "the first line must be the header"),
        (ndjson(HEADER, HEADER), "commit line 2: a second header"),
        (ndjson({"key": "header", "value": {}}), '"summary" must be a string'),
        (ndjson({"key": "header", "value": {"summary": " "}}), '"summary" must not be empty'),
        (ndjson({"key": "header", "value": {"summary": "a\0b"}}), "NUL"),
        (ndjson({"key": "header", "value": {"summary": "\ud800"}}), "not valid Unicode"),
        (ndjson({"key": "header", "value": {"summary": "s", "description": 1}}), '"description"'),
        (ndjson({"key": "header", "value": {"summary": "s", "parentCommit": "main"}}), '"parentCommit"'),
        (ndjson({"key": "header", "value": {"summary": "s", "parentCommit": 1}}), '"parentCommit"'),
        (ndjson(HEADER, file("a", "not base64!")), "'a': the content is not valid base64"),
        (ndjson(HEADER, file("a", "eA")), "not valid base64"),
        (ndjson(HEADER, file("a", "\u00e9")), "not valid base64"),
        (ndjson(HEADER, file("a", "\ud800", "utf-8")), "not valid utf-8"),
        (ndjson(HEADER, file("a", 1)), '"content" must be a string'),
        (ndjson(HEADER, file("a", "x", "rot13")), "unknown encoding 'rot13'"),
        (ndjson(HEADER, file("a", "x", ["b"])), "unknown encoding"),
        (ndjson(HEADER, {"key": "chmod", "value": {}}), "unknown operation 'chmod'"),
        (ndjson(HEADER, {"key": "lfsFile", "value": {"path": "x.bin"}}), '"oid" must be a string'),
        (
            ndjson(HEADER, {"key": "lfsFile", "value": {"path": "x", "oid": "../x"}}),
            "upload the file's content",
        ),
        (
            ndjson(HEADER, {"key": "lfsFile", "value": {"path": "x", "oid": "0" * 64}}),
            "upload the file's content",
        ),
        (ndjson(HEADER, file("ok"), b"bad".decode()), "commit line 3: "),
        (ndjson(HEADER, file("a.txt/x")), "is a file there"),
        (ndjson(HEADER, file("d")), "a folder of this name exists"),
    ],
)
def test_a_malformed_commit_is_refused_with_its_line(
    client: httpx2.Client, unchanged: None, body: bytes, reason: str
) -> None:
    answer = post_commit(client, body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_a_file_over_the_limit_is_refused_and_leaves_nothing(
    client: httpx2.Client, hub: RunningHub, unchanged: None
) -> None:
    content = base64.b64encode(bytes((64 << 20) + 1)).decode()
    answer = post_commit(client, ndjson(HEADER, file("small"), file("big.bin", content)))
    assert answer.status_code == 413
    assert "commit line 3: 'big.bin' is larger than the 64 MiB" in answer.json()["error"]
    assert not list((hub.root / "tmp").iterdir())


def test_a_refused_commit_leaves_no_objects_behind(client: httpx2.Client, hub: RunningHub) -> None:
    objects = hub.root / "repos/kernels/org/target.git/objects"
    before = set(objects.rglob("*"))
    assert (
        post_commit(client, ndjson(HEADER, file("new", "bmV3IGNvbnRlbnQ="), {"key": "x"})).status_code == 400
    )
    assert set(objects.rglob("*")) == before
    assert not list((hub.root / "tmp").iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".hidden",
        "-x",
        "x-",
        "a--b",
        "a..b",
        "x.git",
        "x.GIT",
        "a b",
        "a\\b",
        "\u00e9",
        "x" * 97,
        "a\0b",
        "",
        "a/b/c",
    ],
)
def test_an_invalid_repository_name_is_refused(client: httpx2.Client, name: str) -> None:
    for body in ({"name": name, "organization": "org"}, {"name": "fine", "organization": name or "-"}):
        answer = client.post("/api/repos/create", json={**body, "type": "kernel"})
        assert answer.status_code == 400
        assert answer.json()["error"]
    if "/" not in name and name not in ("", ".."):
        assert client.get(f"/api/kernels/org/{quote(name)}").status_code == 400


@pytest.mark.parametrize("namespace", ["api", "kernels", "Models", "datasets", "healthz"])
def test_a_namespace_that_would_hide_the_hubs_own_addresses_is_refused(
    client: httpx2.Client, namespace: str
) -> None:
    answer = client.post("/api/repos/create", json={"name": "x", "organization": namespace})
    assert (answer.status_code, "reserved" in answer.text) == (400, True)


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"name": 1}', b'{"name": "x", "organization": ["org"]}',
     b'{"name": "x", "organization": "org", "type": "space"}', b'{"name": "x", "organization": "org", "type": 1}',
     b'{"name": "x", "organization": "org", "private": "yes"}',
     b'{"name": "x", "organization": "org", "visibility": "protected"}'],
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/api/repos/create"), ("DELETE", "/api/repos/delete"),
     ("POST", "/api/kernels/org/target/preupload/main"), ("PUT", "/api/kernels/org/target/settings"),
     ("POST", "/api/kernels/org/target/tag/main"), ("POST", "/api/validate-yaml")],
)  # fmt: skip
def test_a_malformed_json_body_is_a_4xx(
    client: httpx2.Client, unchanged: None, method: str, path: str, body: bytes
) -> None:
    answer = client.request(method, path, content=body)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "name", ["", "a b", "a..b", "a~1", "a^", "a:b", "a?", "a*", "a[", "/a", "a/", "a.lock", ".a", "@", "a@{b",
             "-a", "HEAD", "refs/heads/x", "f" * 40, "x" * 300, "a\x7f", "a\nb"],
)  # fmt: skip
def test_an_invalid_branch_or_tag_name_is_refused(client: httpx2.Client, unchanged: None, name: str) -> None:
    if name not in ("", "@"):
        assert (
            client.post(f"/api/kernels/org/target/branch/{quote(name, safe='')}", json={}).status_code == 400
        )
    if name != "@":
        answer = client.post("/api/kernels/org/target/tag/main", json={"tag": name})
        assert answer.status_code == 400
        assert "no valid tag name" in answer.json()["error"]


@pytest.mark.parametrize(
    "path",
    ["..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/x", "a.txt%00", "%ff", "%5c..%5cx", "d", "", "a.txt/b", "%"],
)
def test_resolving_what_is_no_file_is_a_4xx(hub: RunningHub, client: httpx2.Client, path: str) -> None:
    # By socket: an HTTP library would tidy these paths up.
    host, port = hub.endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            f"GET /kernels/org/target/resolve/main/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split(b" ")[1][:1] == b"4"
    assert b'"error"' in answer


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=-1", "limit=x", "cursor=x", "limit=" + "9" * 5000, "limit=\u0663"]
)
def test_a_malformed_page_is_refused(client: httpx2.Client, query: str) -> None:
    assert client.get(f"/api/kernels/org/target/tree/main?{query}").status_code == 400


def test_a_host_header_cannot_break_addresses(hub: RunningHub, client: httpx2.Client) -> None:
    for host in ("[", "a b", '"><script>', "x/y", "[::1", "a:99999999"):
        answer = client.post(
            "/api/repos/create",
            json={"name": f"host-{abs(hash(host))}", "organization": "org"},
            headers={"Host": host},
        )
        # None of them is a name of this machine, which is where open writes come from.
        assert answer.status_code in (400, 403)


def test_a_connection_cut_in_the_middle_of_a_commit_changes_nothing(
    hub: RunningHub, client: httpx2.Client, unchanged: None
) -> None:
    host, port = hub.endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            b"POST /api/kernels/org/target/commit/main HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
            + ndjson(HEADER, file("half"))
        )
    assert client.get("/healthz").json() == {"status": "ok"}
    assert "Traceback" not in hub.log.read_text()


text = st.text(max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text, lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(text, inner, max_size=3), max_leaves=5,
)  # fmt: skip
paths = text | st.lists(
    st.sampled_from(["a", "..", ".", "", ".git", "d", "a.txt", "\\", "é"]), max_size=4
).map("/".join)
operations = st.one_of(
    json_values,
    st.fixed_dictionaries(
        {
            "key": st.sampled_from(["header", "file", "deletedFile", "deletedFolder", "lfsFile"]) | text,
            "value": json_values
            | st.fixed_dictionaries(
                {"path": paths | json_values, "content": st.just("eA==") | json_values, "summary": text},
                optional={"encoding": st.sampled_from(["base64", "utf-8"]) | json_values},
            ),
        }
    ),
)


@fuzz
@given(items=st.lists(operations, max_size=5), with_header=st.booleans())
def test_any_commit_body_gets_2xx_or_4xx(
    client: httpx2.Client, items: list[object], with_header: bool
) -> None:
    body = ndjson(*([HEADER] if with_header else []), *items)
    answer = client.post("/api/kernels/org/fuzzed/commit/main", content=body)
    if answer.status_code == 404 and answer.headers.get("x-error-code") == "RepoNotFound":
        client.post("/api/repos/create", json={"name": "fuzzed", "organization": "org", "type": "kernel"})
        answer = client.post("/api/kernels/org/fuzzed/commit/main", content=body)
    assert answer.status_code < 500, answer.text
    assert client.get("/api/kernels/org/fuzzed/tree/main?recursive=true&expand=true").status_code == 200


@fuzz
@given(body=st.binary(max_size=200))
@pytest.mark.parametrize(
    "path",
    ["commit/main", "preupload/main", "paths-info/main", "branch/x", "tag/main", "git"],
)
def test_any_bytes_get_2xx_or_4xx(client: httpx2.Client, path: str, body: bytes) -> None:
    url = "/kernels/org/target/git-upload-pack" if path == "git" else f"/api/kernels/org/target/{path}"
    assert client.post(url, content=body).status_code < 500


@fuzz
@given(
    parts=st.lists(text.filter(bool), min_size=2, max_size=6),
    prefix=st.sampled_from(["", "/api/kernels", "/kernels"]),
)
def test_any_address_gets_2xx_3xx_or_4xx(client: httpx2.Client, prefix: str, parts: list[str]) -> None:
    path = "/".join(quote(part.encode("utf-8", "replace"), safe="") for part in parts)
    for method in ("GET", "HEAD", "DELETE"):
        assert client.request(method, f"{prefix}/{path}").status_code < 500


@fuzz
@given(revision=text.filter(bool), path=paths.filter(bool))
@example(revision=" ", path="a ")
def test_any_revision_and_path_get_an_answer(client: httpx2.Client, revision: str, path: str) -> None:
    rev, encoded = (quote(part.encode("utf-8", "replace"), safe="") for part in (revision, path))
    for url in (
        f"/api/kernels/org/target/revision/{rev}",
        f"/api/kernels/org/target/commits/{rev}",
        f"/api/kernels/org/target/tree/main/{encoded}",
        f"/kernels/org/target/resolve/main/{encoded}",
        f"/kernels/org/target/resolve/{rev}/a.txt",
    ):
        assert client.get(url).status_code < 500


@fuzz
@given(lines=st.text(alphabet="[]!*?\\/ab#-^$ \n", max_size=30), path=st.sampled_from(["a/b", "[", "b"]))
def test_any_gitignore_gets_an_answer(client: httpx2.Client, lines: str, path: str) -> None:
    body = {"files": [{"path": path, "size": 1}], "gitIgnore": lines}
    assert client.post("/api/kernels/org/target/preupload/main", json=body).status_code < 500


def test_the_log_holds_no_traceback_after_all_this(hub: RunningHub, client: httpx2.Client) -> None:
    assert "Traceback" not in hub.log.read_text()


def test_a_flood_of_open_connections_does_not_stop_the_hub(hub: RunningHub, client: httpx2.Client) -> None:
    host, port = hub.endpoint.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=60) for _ in range(100)]
    try:
        assert client.get("/healthz").status_code == 200
    finally:
        for connection in idle:
            connection.close()
