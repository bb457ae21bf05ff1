"""A repository on the Hub: its branches, files and versions, and moving a branch to other files."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import tomli
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from kernelpress.conventions import REPO_TYPE, STATUS, VERSION_BRANCH, YANKED
from kernelpress.errors import PublishError
from kernelpress.hub.client import explained

Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
_SHORT_COMMIT = re.compile(r"[0-9a-f]{4,39}")


def branch_heads(api: HfApi, repo_id: str) -> dict[str, str]:
    """Branches of a repository and the commits they are at."""
    refs = api.list_repo_refs(repo_id, repo_type=REPO_TYPE)
    return {branch.name: branch.target_commit for branch in refs.branches}


def branch_head(api: HfApi, repo_id: str, branch: str) -> str:
    """The commit that a branch is at.

    Raises:
        PublishError: There is no such branch.
    """
    heads = branch_heads(api, repo_id)
    if branch not in heads:
        raise PublishError(f"{repo_id} has no branch {branch}; it has {', '.join(sorted(heads))}")
    return heads[branch]


def versions_of(branches: Iterable[str]) -> list[int]:
    """The versions among branch names, in order."""
    return sorted(int(match[1]) for name in branches if (match := VERSION_BRANCH.fullmatch(name)))


def tree(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """Every file of a revision by its path."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=REPO_TYPE)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def fetch(api: HfApi, repo_id: str, revision: str, path: str) -> bytes:
    """The content of one file of a repository, around every cache."""
    with tempfile.TemporaryDirectory(prefix="kernelpress-") as scratch:
        file = api.hf_hub_download(repo_id, path, repo_type=REPO_TYPE, revision=revision, local_dir=scratch)
        return Path(file).read_bytes()


def content_id(entry: RepoFile) -> str:
    """An id that two files share exactly when their content is the same."""
    return entry.lfs.sha256 if entry.lfs is not None else entry.blob_id


def has_content(entry: RepoFile, data: bytes) -> bool:
    """True if a file on the Hub holds these bytes."""
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def read_status(
    api: HfApi, repo_id: str, revision: str, paths: Iterable[str]
) -> tuple[str | None, str | None]:
    """The reason why a revision was yanked, and the repository that it redirects to; ``None`` for neither.

    Args:
        api: The Hub.
        repo_id: The kernel.
        revision: A branch, tag or commit of it.
        paths: The files that the revision holds.
    """
    values = []
    for path, key in ((YANKED, "reason"), (STATUS, "destination")):
        value = None
        if path in paths:
            try:
                value = str(tomli.loads(fetch(api, repo_id, revision, path).decode("utf-8")).get(key))
            except (tomli.TOMLDecodeError, UnicodeDecodeError):
                value = f"(its {path} cannot be read)"
        values.append(value)
    return values[0], values[1]


def full_commit(api: HfApi, repo_id: str, revision: str) -> str:
    """The revision, with the whole id of a commit in the place of its first digits.

    Messages name commits by their first digits, and the Hub knows commits by all of them alone.

    Raises:
        PublishError: Several commits of the repository's branches begin like this.
    """
    if not _SHORT_COMMIT.fullmatch(revision):
        return revision
    refs = api.list_repo_refs(repo_id, repo_type=REPO_TYPE)
    if any(ref.name == revision for ref in (*refs.branches, *refs.tags)):
        return revision
    commits = {
        commit.commit_id
        for branch in refs.branches
        for commit in api.list_repo_commits(repo_id, repo_type=REPO_TYPE, revision=branch.target_commit)
        if commit.commit_id.startswith(revision)
    }
    if len(commits) > 1:
        raise PublishError(
            f"several commits of {repo_id} begin with {revision}: {', '.join(sorted(commits))}; give one of them"
        )
    return commits.pop() if commits else revision


@contextmanager
def staging_branch(api: HfApi, repo_id: str, name: str, base: str) -> Iterator[str]:
    """A branch at ``base`` that nobody reads, to make a commit on; it is removed afterwards.

    A version's branch that was made first and filled then would for a moment show its readers some other tree.
    """
    branch = f"kernelpress-staging-{name}"
    with suppress(HfHubHTTPError):
        api.delete_branch(repo_id, branch=branch, repo_type=REPO_TYPE)
    api.create_branch(repo_id, branch=branch, revision=base, repo_type=REPO_TYPE)
    try:
        yield branch
    finally:
        with suppress(HfHubHTTPError, httpx2.HTTPError):
            api.delete_branch(repo_id, branch=branch, repo_type=REPO_TYPE)


def restore(
    api: HfApi, repo_id: str, branch: str, revision: str, message: str, *, base: str | None = None
) -> str:
    """Give a branch exactly the files of another revision, in a new commit.

    Args:
        api: The Hub.
        repo_id: The kernel.
        branch: The branch to change.
        revision: The revision whose files it gets.
        message: The commit's message.
        base: The commit that the branch must still be at; by default whichever it is at.

    Returns:
        The commit that the branch is at then; no new one where the files are the same already.

    Raises:
        PublishError: The Hub does not know one of them, refuses, or does not answer.
    """
    with explained(api, repo_id):
        base = base or branch_head(api, repo_id, branch)
        new, old = tree(api, repo_id, revision), tree(api, repo_id, base)
        operations: list[Operation] = [
            CommitOperationCopy(path, path, src_revision=revision)
            for path, entry in sorted(new.items())
            if path not in old or content_id(old[path]) != content_id(entry)
        ]
        operations += [
            CommitOperationDelete(path, is_folder=False) for path in sorted(old) if path not in new
        ]
        if not operations:
            return base
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            repo_type=REPO_TYPE,
            revision=branch,
            parent_commit=base,
        )
        return str(commit.oid)
