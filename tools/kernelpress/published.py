"""What a version of a kernel on the Hub holds, for comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from kernelpress.errors import CheckError

_PUBLISHED = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")


def published_files(against: str, endpoint: str | None = None) -> Path:
    """A directory with the build that ``PATH`` or ``REPO@vN`` names.

    Args:
        against: A directory, or a repository of the Hub with one of its branches.
        endpoint: The Hub's address; by default that of the client's own environment variables.

    Raises:
        CheckError: There is no such directory or version, or the Hub does not answer.
    """
    if Path(against).is_dir():
        return Path(against)
    named = _PUBLISHED.fullmatch(against)
    if named is None:
        raise CheckError(f"{against!r} is neither a directory nor a version on the Hub such as org/name@v1")
    try:
        found = snapshot_download(
            named["repo"], repo_type="kernel", revision=named["revision"], allow_patterns="build/**",
            endpoint=HfApi(endpoint=endpoint).endpoint,
        )  # fmt: skip
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, json.JSONDecodeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckError(f"{against} cannot be had from the Hub: {reason}") from error
    return Path(found) / "build"
