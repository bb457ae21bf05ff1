"""The files of a published variant to compare with: from a directory, or from a version on the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from kernelpress.conventions import VARIANT_PREFIX
from kernelpress.errors import CheckError

_PUBLISHED = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")


def published_files(against: str, endpoint: str | None = None) -> dict[str, bytes]:
    """Read the Python files of what ``PATH`` or ``REPO@vN`` names, by their paths in the variant.

    Args:
        against: A directory that holds a variant or a build, or a repository of the Hub with one of its branches.
        endpoint: The Hub's address; by default that of the client's own environment variables.

    Raises:
        CheckError: There is no such directory or version, or the Hub does not answer.
    """
    if Path(against).is_dir():
        return read_variant(Path(against))
    named = _PUBLISHED.fullmatch(against)
    if named is None:
        raise CheckError(f"{against!r} is neither a directory nor a version on the Hub such as org/name@v1")
    try:
        snapshot = snapshot_download(
            named["repo"], repo_type="kernel", revision=named["revision"], allow_patterns="build/**",
            endpoint=HfApi(endpoint=endpoint).endpoint,
        )  # fmt: skip
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, json.JSONDecodeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckError(f"{against} cannot be had from the Hub: {reason}") from error
    return read_variant(Path(snapshot, "build"))


def read_variant(directory: Path) -> dict[str, bytes]:
    """Read the Python files of a variant, or of the first variant of a build, by their paths in it.

    Raises:
        CheckError: There is no such directory.
    """
    if not directory.is_dir():
        raise CheckError("there is no build here; run `kernelpress build` first", path=directory)
    variants = sorted(path for path in directory.glob(f"{VARIANT_PREFIX}*") if path.is_dir())
    root = variants[0] if variants else directory
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.py"))}
