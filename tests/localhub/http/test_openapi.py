"""schemathesis reads the Hub's own description and looks for requests that it answers by a 5xx."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
import schemathesis
from huggingface_hub import CommitOperationAdd, HfApi
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from localhub import RunningHub, fsck
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup, ServerError

# What exists, so that more than the first line of a handler is reached; every second request keeps what was generated.
LIKELY = {"kind": "kernels", "namespace": "org", "name": "described", "ref": "main", "rest": "README.md"}


@schemathesis.serializer("application/x-ndjson", "application/x-git-upload-pack-request")
def as_lines(context: Any, value: Any) -> bytes:
    """A list as one line of JSON for each item; schemathesis knows no such kind of body."""
    return (
        value if isinstance(value, bytes) else b"\n".join(json.dumps(item).encode() for item in _items(value))
    )


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def search(endpoint: str, examples: int, **only: str) -> None:
    """Send that many made-up requests, of some operations alone if ``only`` says which.

    Raises:
        FailureGroup: A request was answered by a 5xx.
    """
    described = schemathesis.openapi.from_url(f"{endpoint}/api/openapi.json")
    if only:
        described = described.include(**only)

    @seed(20261121)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=described.as_strategy(), likely=st.booleans())
    def one(case: Any, likely: bool) -> None:
        if likely:
            for name in set(LIKELY) & set(case.path_parameters):
                case.path_parameters[name] = quote(LIKELY[name], safe="")
        case.call_and_validate(base_url=endpoint, checks=[not_a_server_error], timeout=60)

    one()


@pytest.fixture(scope="module")
def filled(hub: RunningHub, api: HfApi) -> RunningHub:
    api.create_repo("org/described", repo_type="kernel")
    files = [CommitOperationAdd("README.md", b"# x"), CommitOperationAdd("build/torch-cpu/x.py", b"x")]
    api.create_commit("org/described", files, commit_message="x", repo_type="kernel")
    return hub


def test_no_described_request_is_answered_by_a_server_error(filled: RunningHub) -> None:
    search(filled.endpoint, 250)
    assert httpx2.get(f"{filled.endpoint}/healthz").status_code == 200
    assert fsck(filled.root).faults == ()
    assert "Traceback" not in filled.log.read_text()


def test_a_server_error_would_be_seen(broken_hub: str) -> None:
    with pytest.raises(FailureGroup) as caught:
        search(broken_hub, 50, method="POST", path_regex="/commit/")
    assert [type(error) for error in caught.value.exceptions] == [ServerError]
    assert "/commit/" in str(caught.value)
