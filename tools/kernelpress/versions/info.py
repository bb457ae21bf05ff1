"""A kernel on the Hub and its versions, as its readers find them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from kernelpress.conventions import MAIN, METADATA, REPO_TYPE, SIGNATURE
from kernelpress.errors import PublishError
from kernelpress.hub.client import checked_repo_id, explained
from kernelpress.hub.repository import branch_heads, fetch, full_commit, read_status, tree, versions_of


@dataclass(frozen=True)
class VersionInfo:
    """A version on the Hub.

    ``source`` is the commit of the sources (with ``+`` where they differed from it), ``yanked`` the reason,
    ``redirect`` the repository that its readers are sent to, ``size`` in bytes, ``signed`` whether every variant is.
    """

    version: int
    commit: str
    date: str
    variants: tuple[str, ...]
    size: int
    source: str | None
    signed: bool
    yanked: str | None
    redirect: str | None


@dataclass(frozen=True)
class RepoInfo:
    """A kernel repository; ``main_version`` is the version whose build ``main`` holds."""

    repo_id: str
    url: str
    private: bool
    main: str
    main_version: int | None
    versions: tuple[VersionInfo, ...]


def info(api: HfApi, repo_id: str) -> RepoInfo:
    """Describe a repository and its versions.

    Raises:
        PublishError: It is not there, or the Hub does not answer.
    """
    checked_repo_id(repo_id)
    with explained(api, repo_id):
        heads = branch_heads(api, repo_id)
        main = heads.get(MAIN, "")
        metadata = _metadata(api, repo_id, main, tree(api, repo_id, main)) if main else {}
        main_version = metadata.get("version")
        return RepoInfo(
            repo_id=repo_id,
            url=f"{api.endpoint}/kernels/{repo_id}",
            private=bool(api.repo_info(repo_id, repo_type=REPO_TYPE).private),
            main=main,
            main_version=main_version if isinstance(main_version, int) else None,
            versions=tuple(
                _version(api, repo_id, version, heads[f"v{version}"]) for version in versions_of(heads)
            ),
        )


def version_at(api: HfApi, repo_id: str, revision: str) -> int:
    """The version whose build a revision holds.

    Raises:
        PublishError: It holds none, or the Hub does not know it or does not answer.
    """
    checked_repo_id(repo_id)
    with explained(api, repo_id):
        commit = full_commit(api, repo_id, revision)
        version = _metadata(api, repo_id, commit, tree(api, repo_id, commit)).get("version")
    if not isinstance(version, int):
        raise PublishError(f"{revision} of {repo_id} holds no build; name a commit that does")
    return version


def _version(api: HfApi, repo_id: str, version: int, commit: str) -> VersionInfo:
    files = tree(api, repo_id, commit)
    variants = sorted(
        {path.split("/")[1] for path in files if path.startswith("build/") and path.count("/") > 1}
    )
    provenance = _metadata(api, repo_id, commit, files).get("provenance")
    kernel = provenance.get("kernel") if isinstance(provenance, dict) else None
    source = (
        f"{kernel.get('commit')}{'+' if kernel.get('dirty') else ''}" if isinstance(kernel, dict) else None
    )
    yanked, redirect = read_status(api, repo_id, commit, files)
    latest = api.list_repo_commits(repo_id, repo_type=REPO_TYPE, revision=commit)[0]
    return VersionInfo(
        version=version,
        commit=commit,
        date=latest.created_at.isoformat(),
        variants=tuple(variants),
        size=sum(entry.size for entry in files.values()),
        source=source,
        signed=bool(variants) and all(f"build/{name}/{SIGNATURE}" in files for name in variants),
        yanked=yanked,
        redirect=redirect,
    )


def _metadata(api: HfApi, repo_id: str, revision: str, paths: Iterable[str]) -> dict[str, object]:
    """The metadata of any variant: all fields that are read here are the same in each."""
    path = next((path for path in sorted(paths) if path.endswith(f"/{METADATA}")), None)
    if path is None:
        return {}
    try:
        fields = json.loads(fetch(api, repo_id, revision, path))
    except (ValueError, RecursionError, EntryNotFoundError):
        return {}
    return fields if isinstance(fields, dict) else {}
