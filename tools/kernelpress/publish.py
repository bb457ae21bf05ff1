"""Sixth step: a build on its version's branch of the Hub, and on ``main`` if it is the newest.

A branch only ever moves in one commit, made on the revision it was compared with; whoever reads it sees the
whole of one build or the whole of another.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from kernelpress.card import render_card
from kernelpress.errors import PublishError
from kernelpress.spec import is_repo_id
from kernelpress.variant import METADATA, Build, without_provenance

_TYPE = "kernel"
_MAIN = "main"
_CARD = "README.md"
_VERSION_BRANCH = re.compile(r"v(\d+)")


@dataclass(frozen=True)
class BranchPlan:
    """What would change on a branch.

    ``base`` is the commit that the comparison is with: the branch's own, or, where ``exists`` is false, the
    one that it would be made from. With nothing to add or delete the branch already holds the build.
    """

    name: str
    exists: bool
    base: str
    add: Mapping[str, bytes]
    delete: tuple[str, ...]

    @property
    def unchanged(self) -> bool:
        """Whether the branch is there and holds the build already."""
        return self.exists and not self.add and not self.delete


@dataclass(frozen=True)
class Plan:
    """What publishing would do. ``newer`` is the version that ``main`` keeps, where that is a newer one."""

    repo_id: str
    branches: tuple[BranchPlan, ...]
    newer: int | None


@dataclass(frozen=True)
class PublishedBranch:
    """Where a branch stands after publishing; ``changed`` is false if it held the build before."""

    name: str
    commit: str
    changed: bool
    added: int
    deleted: int
    url: str


@dataclass(frozen=True)
class Published:
    """The outcome of publishing a build."""

    repo_id: str
    url: str
    branches: tuple[PublishedBranch, ...]
    newer: int | None


def hub(endpoint: str | None = None) -> HfApi:
    """The Hub's client; everything not given here comes from its own environment variables."""
    return HfApi(endpoint=endpoint, library_name="kernelpress")


def publish(build: Build, repo_id: str | None, api: HfApi, *, private: bool = False) -> Published:
    """Put a build on the Hub, then read it back and compare.

    Args:
        build: What to publish.
        repo_id: ``organization/name``; by default the one in ``build.toml``.
        api: The Hub.
        private: Whether a repository that does not exist yet is made private.

    Raises:
        PublishError: The Hub cannot be reached or refuses, or a branch moved in the meantime. Branches
            already committed are named in the message; all others are as they were.
    """
    repo_id = repo_id or build.spec.repo_id
    if repo_id is None:
        raise PublishError(
            "no repository is named; give --repo-id, or repo-id in [general.hub] of build.toml"
        )
    if not is_repo_id(repo_id):
        raise PublishError(f"{repo_id!r} is no repository id; write it as 'organization/name'")
    with _explained(api, repo_id):
        if not _exists(api, repo_id):
            api.create_repo(repo_id, repo_type=_TYPE, private=private, exist_ok=True)
        todo = plan(build, repo_id, api)
    branches: list[PublishedBranch] = []
    for each in todo.branches:
        with _explained(api, repo_id, done=branches):
            branches.append(_apply(each, build, repo_id, api))
    with _explained(api, repo_id, done=branches):
        _verify(build, repo_id, api, branches)
    return Published(repo_id, f"{api.endpoint}/kernels/{repo_id}", tuple(branches), todo.newer)


def plan(build: Build, repo_id: str, api: HfApi) -> Plan:
    """Compare a build with what a repository holds, and change nothing.

    Raises:
        PublishError: The Hub cannot be reached or refuses.
    """
    with _explained(api, repo_id):
        heads = _heads(api, repo_id)
        if _MAIN not in heads:
            raise PublishError(f"{repo_id} has no branch main, which every repository on the Hub has")
        own = f"v{build.spec.version}"
        published = [int(match[1]) for name in heads if (match := _VERSION_BRANCH.fullmatch(name))]
        newest = max(published, default=build.spec.version)
        newer = newest if newest > build.spec.version else None
        names = [own] if newer is not None else [own, _MAIN]
        wanted = _wanted(build, repo_id)
        branches = tuple(_plan_branch(api, repo_id, name, heads, wanted) for name in names)
        return Plan(repo_id, branches, newer)


def _wanted(build: Build, repo_id: str) -> dict[str, bytes]:
    files = {
        f"build/{variant.name}/{file.path}": file.data for variant in build.variants for file in variant.files
    }
    return files | {_CARD: render_card(build, repo_id).encode("utf-8")}


def _plan_branch(
    api: HfApi, repo_id: str, name: str, heads: Mapping[str, str], wanted: Mapping[str, bytes]
) -> BranchPlan:
    base = heads.get(name, heads[_MAIN])
    there = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=base, repo_type=_TYPE)
        if isinstance(entry, RepoFile)
    }
    add = {
        path: data
        for path, data in wanted.items()
        if path not in there or not _same_content(there[path], data)
    }
    delete = tuple(sorted(path for path in there if path.startswith("build/") and path not in wanted))
    if not delete and all(
        path in there and _same_but_provenance(api, repo_id, base, path, data) for path, data in add.items()
    ):
        add = {}
    return BranchPlan(name, name in heads, base, add, delete)


def _same_content(entry: RepoFile, data: bytes) -> bool:
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _same_but_provenance(api: HfApi, repo_id: str, revision: str, path: str, data: bytes) -> bool:
    if path.rpartition("/")[2] != METADATA:
        return False
    with tempfile.TemporaryDirectory(prefix="kernelpress-") as scratch:
        file = api.hf_hub_download(repo_id, path, repo_type=_TYPE, revision=revision, local_dir=scratch)
        published = Path(file).read_bytes()
    try:
        return without_provenance(published) == without_provenance(data)
    except ValueError:
        return False


def _apply(todo: BranchPlan, build: Build, repo_id: str, api: HfApi) -> PublishedBranch:
    if todo.unchanged:
        commit = todo.base
    elif todo.exists:
        commit = _commit(todo, todo.name, build, repo_id, api)
    elif todo.add or todo.delete:
        # A branch made first and filled then would for a moment show readers of this version some other
        # tree. So the commit is made on a branch that nobody reads, and the version's is made from it.
        staging = f"kernelpress-staging-{todo.name}-{build.content_hash}"
        with suppress(HfHubHTTPError):
            api.delete_branch(repo_id, branch=staging, repo_type=_TYPE)
        api.create_branch(repo_id, branch=staging, revision=todo.base, repo_type=_TYPE)
        try:
            commit = _commit(todo, staging, build, repo_id, api)
            api.create_branch(repo_id, branch=todo.name, revision=commit, repo_type=_TYPE)
        finally:
            with suppress(HfHubHTTPError, httpx2.HTTPError):
                api.delete_branch(repo_id, branch=staging, repo_type=_TYPE)
    else:
        commit = todo.base
        api.create_branch(repo_id, branch=todo.name, revision=commit, repo_type=_TYPE)
    return PublishedBranch(
        name=todo.name,
        commit=commit,
        changed=not todo.unchanged,
        added=len(todo.add),
        deleted=len(todo.delete),
        url=f"{api.endpoint}/kernels/{repo_id}/tree/{todo.name}",
    )


def _commit(todo: BranchPlan, branch: str, build: Build, repo_id: str, api: HfApi) -> str:
    git = build.source.git
    made = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path, data) for path, data in sorted(todo.add.items())),
            *(CommitOperationDelete(path) for path in todo.delete),
        ],
        commit_message=f"{build.spec.name} v{build.spec.version}: build {build.content_hash}",
        commit_description=f"Sources: commit {git.commit}{', modified' if git.dirty else ''}" if git else "",
        repo_type=_TYPE,
        revision=branch,
        parent_commit=todo.base,
    )
    return made.oid


def _verify(build: Build, repo_id: str, api: HfApi, branches: list[PublishedBranch]) -> None:
    heads = _heads(api, repo_id)
    wanted = _wanted(build, repo_id)
    for each in branches:
        if heads.get(each.name) != each.commit:
            raise PublishError(
                f"{each.name} of {repo_id} is no longer at {each.commit[:12]}: somebody else has changed it since; "
                "look at what they published, then publish again"
            )
        if not _plan_branch(api, repo_id, each.name, heads, wanted).unchanged:
            raise PublishError(f"{each.name} of {repo_id} does not hold what was sent; publish again")


def _heads(api: HfApi, repo_id: str) -> dict[str, str]:
    refs = api.list_repo_refs(repo_id, repo_type=_TYPE)
    return {branch.name: branch.target_commit for branch in refs.branches}


def _exists(api: HfApi, repo_id: str) -> bool:
    try:
        api.list_repo_refs(repo_id, repo_type=_TYPE)
    except RepositoryNotFoundError:
        return False
    return True


@contextmanager
def _explained(api: HfApi, repo_id: str, done: list[PublishedBranch] | None = None) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one message that says what to do."""
    landed = [each.name for each in done or () if each.changed]
    after = f"; published before that: {', '.join(landed)}" if landed else ""
    try:
        yield
    except HfHubHTTPError as error:
        raise PublishError(_reason(error, repo_id) + after) from error
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, EntryNotFoundError) as error:
        raise PublishError(f"{repo_id}: {_first_line(error)}{after}") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise PublishError(
            f"the Hub at {api.endpoint} does not answer ({_first_line(error) or type(error).__name__}); check the "
            f"address (--endpoint or HF_ENDPOINT) and the connection{after}"
        ) from error


def _reason(error: HfHubHTTPError, repo_id: str) -> str:
    status = 404 if isinstance(error, RepositoryNotFoundError) else error.response.status_code
    said = error.server_message or _first_line(error)
    if status in (409, 412):
        return f"somebody else changed {repo_id} meanwhile; look at what they published, then publish again ({said})"
    if status == 401:
        return f"the Hub refuses the token; log in with `hf auth login` or set HF_TOKEN to one that may write ({said})"
    if status == 403:
        return f"the token may not write to {repo_id}; use one of its organization's, or another --repo-id ({said})"
    if status == 404:
        return f"{repo_id} is not there or not yours to see; check the id and the token ({said})"
    return f"the Hub answers {status} for {repo_id}: {said}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
