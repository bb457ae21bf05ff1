"""Connections that say nothing, or stop in the middle, keep nobody else out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest
from huggingface_hub import HfApi

# The Hub itself, with the times that it waits made short.
IMPATIENT = """
import sys
from pathlib import Path
from localhub import connections, serve
connections.REQUEST_SECONDS, connections.SILENCE_SECONDS = float(sys.argv[2]), float(sys.argv[3])
serve(Path(sys.argv[1]), open_writes=True)
"""


class Running(NamedTuple):
    endpoint: str
    pid: int
    log: Path

    def connect(self) -> socket.socket:
        host, port = self.endpoint.removeprefix("http://").split(":")
        # Only a test that fails waits that long.
        return socket.create_connection((host, int(port)), timeout=120)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextmanager
def serving(
    root: Path, *, limit: int = 4096, request: float = 300, silence: float = 300
) -> Iterator[Running]:
    # The soft limit is lower, as it is on most systems: the Hub raises it.
    command = ["sh", "-c", f'ulimit -S -n {limit // 2} && ulimit -H -n {limit} && exec "$@"', "sh"]
    command += [sys.executable, "-c", IMPATIENT, str(root), str(request), str(silence)]
    log = root.with_suffix(".log")
    with open(log, "wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        yield Running(process.stdout.readline().split()[3], process.pid, log)
    finally:
        process.terminate()
        process.wait(60)


def test_more_silent_connections_than_descriptors_leave_the_hub_answering(root: Path) -> None:
    with serving(root, limit=256) as hub, ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(hub.connect())
        for _ in range(3):
            assert httpx2.get(f"{hub.endpoint}/healthz", timeout=120).status_code == 200
        assert HfApi(endpoint=hub.endpoint, token=False).create_repo("org/k", repo_type="kernel")
        assert hub.descriptors() <= 256
    assert len(hub.log.read_text().splitlines()) <= 2


def test_the_limit_of_open_files_is_raised(root: Path) -> None:
    with serving(root, limit=1024) as hub:
        limits = Path(f"/proc/{hub.pid}/limits").read_text()
    [line] = [line for line in limits.splitlines() if line.startswith("Max open files")]
    assert line.split()[3:5] == ["1024", "1024"]


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"],
    ids=["nothing", "line", "headers"],
)
@pytest.mark.parametrize(
    "before", [b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["first", "second"]
)
def test_a_request_that_never_comes_is_not_waited_for(root: Path, before: bytes, sent: bytes) -> None:
    with serving(root, request=0.2) as hub, hub.connect() as connection:
        if before:
            connection.sendall(before)
            with connection.makefile("rb") as answer:
                assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
                while answer.readline() != b"\r\n":
                    pass
                assert answer.read(15) == b'{"status":"ok"}'
        connection.sendall(sent)
        with suppress(ConnectionResetError):
            assert connection.recv(1 << 16) == b""


def test_a_body_that_stops_is_not_waited_for(root: Path) -> None:
    with serving(root, silence=0.2) as hub, hub.connect() as connection:
        connection.sendall(
            b"POST /api/repos/create HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
        )
        with suppress(ConnectionResetError):
            assert connection.recv(1 << 16) == b""
        assert httpx2.get(f"{hub.endpoint}/healthz").status_code == 200


def test_a_response_that_nobody_reads_is_given_up(root: Path) -> None:
    with serving(root, silence=0.5) as hub:
        api = HfApi(endpoint=hub.endpoint, token=False)
        api.create_repo("org/k", repo_type="kernel")
        noise = os.urandom(24 << 20)
        api.upload_file(path_or_fileobj=noise, path_in_repo="f", repo_id="org/k", repo_type="kernel")
        with hub.connect() as connection:
            connection.sendall(b"GET /kernels/org/k/resolve/main/f HTTP/1.1\r\nHost: localhost\r\n\r\n")
            # It is over when the other side has no such connection any more: nothing is read here.
            address = f"0100007F:{connection.getsockname()[1]:04X}"
            for _ in range(1200):
                if not any(line.split()[2] == address for line in _established()):
                    break
                time.sleep(0.1)
            else:
                pytest.fail("the connection is still open")
        # Who reads gets it all, however often it stops for a moment.
        assert httpx2.get(f"{hub.endpoint}/kernels/org/k/resolve/main/f", timeout=120).content == noise


def _established() -> list[str]:
    """The kernel's lines of connections that are open on both sides."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return [line for line in lines if line.split()[3] == "01"]
