"""The files of a published variant to compare with: from a directory, or from a version on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from kernelpress.api.baseline import read_variant
from kernelpress.errors import CheckError
from kernelpress.hub.client import explained, hub

_PUBLISHED = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")


def published_files(against: str, endpoint: str | None = None) -> dict[str, bytes]:
    """Read the Python files of what ``PATH`` or ``REPO@vN`` names, by their paths in the variant.

    Args:
        against: A directory that holds a variant or a build, or a repository of the Hub with one of its branches.
        endpoint: The Hub's address; by default that of the client's own environment variables.

    Raises:
        CheckError: There is no such directory.
        PublishError: There is no such version, or the Hub does not answer.
    """
    if Path(against).is_dir():
        return read_variant(Path(against))
    version = _PUBLISHED.fullmatch(against)
    if version is None:
        raise CheckError(f"{against!r} is neither a directory nor a version on the Hub such as org/name@v1")
    api = hub(endpoint)
    with explained(api, version["repo"]):
        try:
            snapshot = snapshot_download(
                version["repo"], repo_type="kernel", revision=version["revision"], allow_patterns="build/**",
                endpoint=api.endpoint,
            )  # fmt: skip
        except LocalEntryNotFoundError as error:
            # The client looks in its cache where the Hub fails, and then says that instead.
            raise error.__cause__ or error from None
    return read_variant(Path(snapshot, "build"))
