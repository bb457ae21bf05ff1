"""Publishing over a bad connection: a proxy that answers 429, 500 and 503 or hangs up, and a Hub that is killed."""

from __future__ import annotations

import http.client
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from kernelpress.builder.build import build
from kernelpress.errors import PublishError
from kernelpress.hub.client import hub as client
from kernelpress.hub.repository import branch_heads, tree
from kernelpress.publish.plan import plan
from kernelpress.publish.publish import publish
from kernelpress.spec.load import load_spec
from localhub import RunningHub, fsck, running_hub

Fault = Callable[[int, str, str], str | int]


@pytest.fixture(autouse=True)
def no_settings_of_the_developers_own(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("kernelpress.publish.publish._FIRST_WAIT", 0.01)
    # The client's own waits, of one second each, for what it tries again by itself.
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@contextmanager
def proxy(endpoint: str, fault: Fault) -> Iterator[str]:
    """A real proxy that spoils requests: by a status, by hanging up before the Hub hears, or before it answers."""
    address, count, lock = urlsplit(endpoint), [0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def spoil(self) -> None:
            with lock:
                number = count[0]
                count[0] += 1
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            damage = fault(number, self.command, self.path)
            if isinstance(damage, int):
                self.send_response(damage)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if damage == "cut before":
                self.close_connection = True
                return
            onward = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
            onward.request(self.command, self.path, body, dict(self.headers.items()))
            answer = onward.getresponse()
            data = answer.read()
            onward.close()
            if damage == "cut after":
                self.close_connection = True
                return
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(key, value)
            self.send_header("Content-Length", answer.getheader("content-length") or str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = spoil

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


@pytest.mark.parametrize("damage", ["cut before", "cut after", 503, 429, 500])
def test_a_fault_at_any_one_request_of_a_publish_is_survived_with_one_commit(make_kernel, server, damage):
    kernel = build(load_spec(make_kernel()))
    straight = client(server.endpoint)
    paths: list[str] = []

    def watch(number: int, method: str, path: str) -> str:
        paths.append(path)
        return ""

    name = str(damage).replace(" ", "-")
    with proxy(server.endpoint, watch) as endpoint:
        publish(kernel, f"org/watched-{name}", client(endpoint))
    # Those that write too: of a second publish to one repository there would be none.
    assert any("/commit/" in path for path in paths)
    # Not the very first: a Hub that was never reached is an address to check. Of the statuses, each request gets one.
    first, step = {"cut before": (1, 2), "cut after": (1, 1), 503: (1, 3), 429: (2, 3), 500: (3, 3)}[damage]
    for spoiled in range(first, len(paths), step):
        repo = f"org/fault-{name}-{spoiled}"
        with proxy(
            server.endpoint, lambda number, method, path, at=spoiled: damage if number == at else ""
        ) as endpoint:
            published = publish(kernel, repo, client(endpoint))
        assert [branch.changed for branch in published.branches] == [True, True]
        assert plan(kernel, repo, straight).unchanged
        assert branch_heads(straight, repo).keys() == {"main", "v1"}
        history = straight.list_repo_commits(repo, repo_type="kernel", revision="v1")
        assert [commit.title for commit in history][1:] == ["initial commit"]


def test_a_hub_that_only_answers_503_ends_in_one_message(make_kernel, server):
    kernel = build(load_spec(make_kernel()))
    with (
        proxy(server.endpoint, lambda number, method, path: 503) as endpoint,
        pytest.raises(PublishError, match="the Hub answers 503"),
    ):
        publish(kernel, "org/never", client(endpoint))


def test_a_hub_killed_at_any_request_of_a_publish_comes_back_whole_and_the_next_publish_finishes(
    make_kernel, tmp_path
):
    kernel = build(load_spec(make_kernel()))
    expected = {f"build/{variant.name}/{file.path}" for variant in kernel.variants for file in variant.files}
    for at in (4, 7, 10):
        root, repo = tmp_path / f"hub-{at}", "org/killed"
        with running_hub(root) as running:

            def kill(number: int, method: str, path: str, at: int = at, running: RunningHub = running) -> str:
                if number == at:
                    threading.Timer(0.003, os.kill, (running.pid, signal.SIGKILL)).start()
                return ""

            with proxy(running.endpoint, kill) as endpoint:
                try:
                    publish(kernel, repo, client(endpoint))
                except PublishError as error:
                    assert "does not answer" in error.message or "answers 5" in error.message  # noqa: PT017
        assert fsck(root).faults == ()
        with running_hub(root) as again:
            api = client(again.endpoint)
            if api.repo_exists(repo, repo_type="kernel"):
                for branch in branch_heads(api, repo):
                    paths = {path for path in tree(api, repo, branch) if path.startswith("build/")}
                    assert paths in (set(), expected)
            publish(kernel, repo, api)
            assert plan(kernel, repo, api).unchanged
