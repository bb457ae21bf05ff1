"""Going back to an earlier build of a version."""

from __future__ import annotations

from huggingface_hub import HfApi

from kernelpress.conventions import MAIN
from kernelpress.hub.client import RefusedError, explained
from kernelpress.hub.repository import full_commit, restore
from kernelpress.versions.info import version_at


def rollback(api: HfApi, repo_id: str, to: str, branch: str | None = None) -> tuple[str, str]:
    """Give a branch the content of an earlier revision, in a new commit; history stays.

    Args:
        api: The Hub.
        repo_id: The kernel.
        to: A commit (its first digits will do), tag or branch of the repository.
        branch: A version's branch, or ``main``; by default that of the version which ``to`` holds.

    Returns:
        The branch and its new commit; the present one where the content is the same already.

    Raises:
        RefusedError: ``to`` holds another version than ``branch`` stands for.
        PublishError: The Hub does not know one of them, refuses, or does not answer.
    """
    version = version_at(api, repo_id, to)
    branch = branch or f"v{version}"
    if branch not in (MAIN, f"v{version}"):
        raise RefusedError(
            f"{to} holds version {version}, and {branch} cannot: name a commit of {branch} "
            f"(`kernelpress info {repo_id}` lists versions)"
        )
    with explained(api, repo_id):
        commit = full_commit(api, repo_id, to)
    return branch, restore(api, repo_id, branch, commit, f"Roll {branch} back to {to}")
