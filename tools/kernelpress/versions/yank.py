"""Versions that readers should no longer take: yanked, or moved to another repository."""

from __future__ import annotations

import json

from huggingface_hub import CommitOperationAdd, HfApi

from kernelpress.conventions import MAIN, REPO_TYPE, STATUS, YANKED
from kernelpress.errors import PublishError
from kernelpress.hub.client import RefusedError, checked_repo_id, explained
from kernelpress.hub.repository import branch_head, branch_heads, fetch, read_status, tree, versions_of
from kernelpress.versions.info import info
from kernelpress.versions.notice import notice


def yank(api: HfApi, repo_id: str, version: int, reason: str) -> dict[str, str]:
    """Tell readers of a version not to use it; its files stay, and go on working.

    Returns:
        Each branch that was changed, and its new commit: the version's, and ``main`` where that holds it.

    Raises:
        PublishError: There is no such version, or the Hub refuses or does not answer.
    """
    reason = " ".join(reason.split())
    if not reason:
        raise PublishError("readers have to be told why; give --reason")
    checked_repo_id(repo_id)
    branches = [f"v{version}"]
    if info(api, repo_id).main_version == version:
        branches.append(MAIN)
    warning = f"{repo_id} v{version} was yanked by its publisher: {reason}"
    fields: dict[str, str | int] = {"version": version, "reason": reason}
    message = f"Yank v{version}: {reason}"
    with explained(api, repo_id):
        return {
            branch: commit
            for branch in branches
            if (commit := _mark(api, repo_id, branch, YANKED, fields, warning, message))
        }


def redirect(api: HfApi, repo_id: str, to: str) -> dict[str, str]:
    """Send the readers of every version to the same version of another repository.

    That is upstream's ``kernel-status.toml``. A loader that does not read it goes on with the files here,
    which warn that the kernel has moved.

    Returns:
        Each branch that was changed, and its new commit.

    Raises:
        RefusedError: The other repository lacks a version that this one has, or redirects itself.
        PublishError: One of them is not there, or the Hub refuses or does not answer.
    """
    checked_repo_id(repo_id)
    checked_repo_id(to)
    if repo_id == to:
        raise PublishError(f"{repo_id} cannot redirect to itself")
    with explained(api, to):
        targets = branch_heads(api, to)
        onward = (
            read_status(api, to, targets[MAIN], tree(api, to, targets[MAIN]))[1] if MAIN in targets else None
        )
    if onward is not None:
        # Nobody follows a second one, and two that name each other lead nowhere.
        raise RefusedError(f"{to} itself redirects to {onward}; name where readers shall end up")
    commits: dict[str, str] = {}
    with explained(api, repo_id):
        branches = [MAIN, *(f"v{version}" for version in versions_of(branch_heads(api, repo_id)))]
        missing = [branch for branch in branches if branch not in targets]
        if missing:
            raise RefusedError(
                f"{to} has no {', '.join(missing)}, so readers of {repo_id} would find nothing"
            )
        for branch in branches:
            fields: dict[str, str | int] = {"kind": "redirect", "destination": to, "revision": branch}
            warning = f"{repo_id} has moved to {to}"
            commit = _mark(api, repo_id, branch, STATUS, fields, warning, f"Redirect to {to}")
            if commit is not None:
                commits[branch] = commit
    return commits


def _mark(
    api: HfApi,
    repo_id: str,
    branch: str,
    path: str,
    fields: dict[str, str | int],
    warning: str,
    message: str,
) -> str | None:
    """Put a TOML file on a branch and a notice into its variants, unless the same file is there already."""
    # A TOML basic string and a JSON string are the same, as long as JSON escapes what is not ASCII.
    data = "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items()).encode("ascii")
    head = branch_head(api, repo_id, branch)
    if path in tree(api, repo_id, head) and fetch(api, repo_id, head, path) == data:
        return None
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(path, data), *notice(api, repo_id, head, warning)],
        commit_message=message,
        repo_type=REPO_TYPE,
        revision=branch,
        parent_commit=head,
    )
    return str(commit.oid)
