"""Fixtures of huggingface_hub's tests that its source distribution lacks, and the lists of tests beside this file.

run.py copies it into the unpacked distribution as ``tests/conftest.py``.
"""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import _detect_agent

from .testing_constants import ENDPOINT_STAGING, TOKEN, USER
from .testing_utils import repo_name

RepoFactory = Callable[..., RepoUrl]

HUB = urlsplit(ENDPOINT_STAGING).netloc
requests_to_hub = 0
tests_with_requests: set[str] = set()
out_of_scope: Counter[str] = Counter()


class PatternList:
    """A file of patterns, each with a reason: the comment lines right above its group.

    A pattern is ``@marker``, or a module, class or test as pytest names it, in which ``*`` stands for anything.
    """

    def __init__(self, name: str) -> None:
        self.reasons: dict[str, str] = {}
        comment = previous = ""
        for line in Path(os.environ["CLIENT_TESTS_LISTS"], name).read_text("utf-8").splitlines():
            if line.startswith("# "):
                comment = f"{comment} {line[2:]}" if previous.startswith("# ") else line[2:]
            elif line:
                self.reasons[line] = comment
            previous = line
        self.unused = set(self.reasons)

    def reason(self, item: pytest.Item) -> str | None:
        """The reason for which ``item`` is in the list; None if it is not."""
        for pattern, reason in self.reasons.items():
            expression = re.escape(pattern).replace(r"\*", ".*") + r"(\[.*|::.*)?"
            name = item.nodeid.removeprefix("tests/")
            if item.get_closest_marker(pattern[1:]) if pattern[0] == "@" else re.fullmatch(expression, name):
                self.unused.discard(pattern)
                return reason
        return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    excluded, failing = PatternList("out_of_scope.txt"), PatternList("known_failures.txt")
    kept, deselected = [], []
    for item in items:
        reason = excluded.reason(item)
        if reason is not None:
            out_of_scope[reason] += 1
            deselected.append(item)
            continue
        kept.append(item)
        cause = failing.reason(item)
        if cause is not None:
            item.add_marker(pytest.mark.xfail(reason=cause, strict=True))
    unused = sorted(excluded.unused | failing.unused)
    if unused and os.environ["CLIENT_TESTS_COMPLETE"]:
        raise pytest.UsageError(f"patterns that no test meets: {', '.join(unused)}")
    config.hook.pytest_deselected(items=deselected)
    items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = {report.nodeid for report in terminalreporter.stats.get("passed", []) if report.when == "call"}
    terminalreporter.section("embedded Hub")
    requesting = len(passed & tests_with_requests)
    terminalreporter.line(f"{len(passed):5} passed, {requesting} of which sent requests to the Hub")
    terminalreporter.line(f"{out_of_scope.total():5} out of scope:")
    for reason, count in out_of_scope.most_common():
        terminalreporter.line(f"{count:10} {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = requests_to_hub
    outcome = yield
    if requests_to_hub > before:
        tests_with_requests.add(item.nodeid)
    return outcome


send = httpx2.HTTPTransport.handle_request


def count_and_send(transport: httpx2.HTTPTransport, request: httpx2.Request) -> httpx2.Response:
    global requests_to_hub
    requests_to_hub += request.url.netloc.decode() == HUB
    return send(transport, request)


httpx2.HTTPTransport.handle_request = count_and_send
resolve = socket.getaddrinfo


def resolve_loopback(host: str | bytes | None, *arguments: Any, **options: Any) -> Any:
    name = host.decode() if isinstance(host, bytes) else host
    if name not in (None, "127.0.0.1", "::1", "localhost"):
        raise socket.gaierror(f"{name}: these tests reach nothing but the local Hub")
    return resolve(host, *arguments, **options)


# The same outcome with and without a network.
socket.getaddrinfo = resolve_loopback


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no coding agent be detected, whose presence changes what the command line prints."""
    monkeypatch.setattr(_detect_agent, "_registry", {"standardEnvVars": [], "harnesses": {}})


@pytest.fixture(scope="session")
def api() -> HfApi:
    return HfApi(endpoint=ENDPOINT_STAGING, token=TOKEN)


@pytest.fixture
def repo_factory(api: HfApi) -> Iterator[RepoFactory]:
    """Create repositories, by default a model with a new name, and delete them after the test."""
    created: list[tuple[RepoUrl, str | None]] = []

    def create(repo_type: str = "model", repo_id: str | None = None, **options: Any) -> RepoUrl:
        url = api.create_repo(repo_id or repo_name(), repo_type=repo_type, **options)
        created.append((url, options.get("token")))
        return url

    yield create
    for url, token in created:
        api.delete_repo(url.repo_id, repo_type=url.repo_type, token=token, missing_ok=True)


@pytest.fixture
def new_repo_id(api: HfApi) -> Iterator[str]:
    """Name of a model that does not exist, deleted after the test that creates it."""
    repo_id = f"{USER}/{repo_name()}"
    yield repo_id
    api.delete_repo(repo_id, missing_ok=True)
