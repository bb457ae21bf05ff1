"""A real Hub in a real process, and the real client."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from huggingface_hub import HfApi
from localhub import RunningHub, running_hub
from localhub.http.app import create_app
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response

_numbers = itertools.count()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    """One Hub for all tests of a module, open for writes; every test uses repositories of its own."""
    with running_hub(tmp_path_factory.mktemp("hub"), trust=["org"]) as running:
        yield running


@pytest.fixture(scope="module")
def api(hub: RunningHub) -> HfApi:
    # token=False: a token of the developer's own must not get into these tests.
    return HfApi(endpoint=hub.endpoint, token=False)


@pytest.fixture
def new_repo(api: HfApi) -> Callable[..., str]:
    """Creates a kernel repository that no other test uses; returns its id."""

    def create(**options: object) -> str:
        repo = f"org/kernel-{next(_numbers)}"
        api.create_repo(repo, repo_type="kernel", **options)  # type: ignore[arg-type]
        return repo

    return create


@pytest.fixture
def broken_hub(tmp_path: Path) -> Iterator[str]:
    """The address of a Hub whose commits fail as code fails that has a mistake in it."""
    app = create_app(tmp_path / "broken", open_writes=True)
    (commit,) = [
        route
        for route in app.routes
        if isinstance(route, Route)
        and "POST" in (route.methods or ())
        and route.path.endswith("/commit/{ref}")
    ]

    def mistaken(request: Request) -> Response:
        raise KeyError("a mistake")

    # The routes are of the module, and other tests of this process make Hubs of them.
    sound, commit.app = commit.app, request_response(mistaken)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    commit.app = sound


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "hub"
