"""The client of a Hub, its errors in one sentence each, and which of them may pass by themselves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2
from huggingface_hub import HfApi, get_token, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, hf_raise_for_status
from huggingface_hub.utils._http import hf_request_event_hook

from kernelpress.errors import PublishError
from kernelpress.spec.model import is_repo_id

# The client itself waits for ever. A proxy that takes a request and never answers must end in a message; a
# Hub that hashes a large commit before it answers must not.
_TIMEOUT = httpx2.Timeout(120.0, connect=20.0)
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class RefusedError(PublishError):
    """A rule forbids it, or somebody else was faster; the Hub is as it was unless the message says otherwise."""

    exit_code = 4


class TransientError(PublishError):
    """The Hub or the connection failed in a way that may pass.

    ``wait`` are the seconds that the Hub asks for, and ``reached`` is false where no connection was made.
    """

    def __init__(self, message: str, wait: float | None = None, *, reached: bool = True) -> None:
        super().__init__(message)
        self.wait = wait
        self.reached = reached


class MovedError(PublishError):
    """A branch is not where it was when it was looked at."""


def hub(endpoint: str | None = None) -> HfApi:
    """The Hub's client; everything not given here comes from its own environment variables."""
    set_client_factory(_client)
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(endpoint=endpoint, library_name="kernelpress")


def _client() -> httpx2.Client:
    hooks: dict[str, list[Callable[..., Any]]] = {
        "request": [hf_request_event_hook],
        "response": [_raise_for_card_fault],
    }
    return httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=_TIMEOUT)


def _raise_for_card_fault(response: httpx2.Response) -> None:
    # Of this one request, the client reads the answer as JSON before it looks at the status.
    if response.url.path.endswith("/api/validate-yaml") and response.status_code in _TRANSIENT_STATUS:
        response.read()
        hf_raise_for_status(response)


def token_of(api: HfApi) -> str | None:
    """The token that a client sends: its own, or that of the user's environment."""
    if isinstance(api.token, str):
        return api.token
    return None if api.token is False else get_token()


def checked_repo_id(repo_id: str | None) -> str:
    """``repo_id`` if it can be one.

    Raises:
        PublishError: It is missing or no ``organization/name``.
    """
    if repo_id is None:
        raise PublishError(
            "no repository is named; give --repo-id, or repo-id in [general.hub] of build.toml"
        )
    if not is_repo_id(repo_id):
        raise PublishError(f"{repo_id!r} is no repository id; write it as 'organization/name'")
    return repo_id


@contextmanager
def explained(api: HfApi, repo_id: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one message that says what to do.

    Raises:
        TransientError: Trying again may help.
        MovedError: The Hub answers 409 or 412.
        PublishError: Anything else that the Hub or its client says.
    """
    try:
        yield
    except HfHubHTTPError as error:
        raise _from_answer(error, repo_id) from error
    except json.JSONDecodeError as error:
        # The login page of a network, or a web server of another kind.
        raise PublishError(
            f"what answers at {api.endpoint} is no Hub: it sends something else than JSON; check the address "
            "(--endpoint or HF_ENDPOINT), and whether this network wants a login first"
        ) from error
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, EntryNotFoundError) as error:
        raise PublishError(f"{repo_id}: {_first_line(error)}") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        message = (
            f"the Hub at {api.endpoint} does not answer ({_first_line(error) or type(error).__name__}); check the "
            "address (--endpoint or HF_ENDPOINT) and the connection"
        )
        if isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.UnsupportedProtocol):
            raise TransientError(message, reached=not isinstance(error, httpx2.ConnectError)) from error
        raise PublishError(message) from error


def _from_answer(error: HfHubHTTPError, repo_id: str) -> PublishError:
    status = 404 if isinstance(error, RepositoryNotFoundError) else error.response.status_code
    message = error.server_message or _first_line(error)
    if status in _TRANSIENT_STATUS:
        return TransientError(
            f"the Hub answers {status} for {repo_id}: {message}", _wait(error.response.headers)
        )
    if status in (409, 412):
        return MovedError(
            f"somebody else changed {repo_id} meanwhile; look at what they published, then publish again ({message})"
        )
    if status == 401:
        return PublishError(
            f"the Hub refuses the token; log in with `hf auth login` or set HF_TOKEN to one that may write ({message})"
        )
    if status == 403:
        return PublishError(
            f"the token may not write to {repo_id}; use one of its organization's, or another --repo-id ({message})"
        )
    if isinstance(error, RevisionNotFoundError):
        return PublishError(
            f"{repo_id} has no such branch, tag or commit; `kernelpress info {repo_id}` lists versions ({message})"
        )
    if status == 404:
        return PublishError(
            f"{repo_id} is not there or not yours to see; check the id and the token ({message})"
        )
    return PublishError(f"the Hub answers {status} for {repo_id}: {message}")


def _wait(headers: Mapping[str, str]) -> float | None:
    text = headers.get("retry-after", "")
    return min(float(text), 60.0) if text.isascii() and text.isdigit() else None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
