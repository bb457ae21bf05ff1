"""Upload of the versions in an archive that ``bundle`` wrote to another Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from kernelpress.conventions import MAIN, REPO_TYPE, VERSION_BRANCH
from kernelpress.hub.client import RefusedError, checked_repo_id, explained
from kernelpress.hub.repository import branch_heads, has_content, staging_branch, tree, versions_of
from kernelpress.versions.bundle import files_below, opened


def upload(archive: Path, api: HfApi, repo_id: str | None = None, *, private: bool = False) -> dict[str, str]:
    """Put every version of an archive on another Hub, in their order; what is there already stays.

    ``main`` changes only where the archive's newest version is the newest there, so it never goes back.

    Args:
        archive: What ``bundle`` wrote.
        api: The Hub to put it on.
        repo_id: By default the one it was made from.
        private: Whether a repository that does not exist yet is made private.

    Returns:
        Each branch that changed, and its new commit.

    Raises:
        RefusedError: A version is there with other content.
        PublishError: The archive is damaged, or the Hub refuses or does not answer.
    """
    with opened(archive) as (manifest, commits, folder):
        target = checked_repo_id(repo_id or manifest["repo-id"])
        changed: dict[str, str] = {}
        with explained(api, target):
            api.create_repo(target, repo_type=REPO_TYPE, private=private, exist_ok=True)
            for name in sorted(commits, key=_order):
                branches = branch_heads(api, target)
                message = f"Unbundle {manifest['repo-id']}@{name}, commit {commits[name][:12]}"
                newest = max(versions_of(branches), default=-1)
                if name == MAIN:
                    if newest <= max(versions_of(commits), default=-1):
                        commit = _commit(api, target, MAIN, branches[MAIN], folder / MAIN, message)
                        if commit != branches[MAIN]:
                            changed[MAIN] = commit
                    continue
                if name in branches:
                    if _operations(api, target, branches[name], folder / name):
                        raise RefusedError(f"{name} of {target} holds something else than the archive")
                    continue
                # A version's branch is made of a finished commit, so that it never shows another tree.
                if newest > _order(name)[1]:
                    with staging_branch(api, target, name, branches[MAIN]) as staged:
                        commit = _commit(api, target, staged, branches[MAIN], folder / name, message)
                        api.create_branch(target, branch=name, revision=commit, repo_type=REPO_TYPE)
                else:
                    commit = _commit(api, target, MAIN, branches[MAIN], folder / name, message)
                    if commit != branches[MAIN]:
                        changed[MAIN] = commit
                    api.create_branch(target, branch=name, revision=commit, repo_type=REPO_TYPE)
                changed[name] = commit
        return changed


def _order(name: str) -> tuple[int, int]:
    match = VERSION_BRANCH.fullmatch(name)
    return (1, 0) if match is None else (0, int(match[1]))


def _commit(api: HfApi, repo_id: str, branch: str, base: str, folder: Path, message: str) -> str:
    """Give a branch that is at ``base`` the files of a folder; returns the commit that it is at then."""
    operations = _operations(api, repo_id, base, folder)
    if not operations:
        return base
    created = api.create_commit(
        repo_id, operations, commit_message=message, repo_type=REPO_TYPE, revision=branch, parent_commit=base
    )
    return str(created.oid)


def _operations(
    api: HfApi, repo_id: str, revision: str, folder: Path
) -> list[CommitOperationAdd | CommitOperationDelete]:
    entries = tree(api, repo_id, revision)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_below(folder)}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for path, data in files.items():
        if path not in entries or not has_content(entries[path], data):
            operations.append(CommitOperationAdd(path, data))
    operations += [
        CommitOperationDelete(path, is_folder=False) for path in sorted(entries.keys() - files.keys())
    ]
    # How a Hub stores files is its own affair.
    return [operation for operation in operations if operation.path_in_repo != ".gitattributes"]
