"""A real Hub in a real process, and the real client."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from kernelpress.localhub import RunningHub, running_hub

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
def root(tmp_path: Path) -> Path:
    return tmp_path / "hub"
