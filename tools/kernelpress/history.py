"""Versions that are on a Hub: what they are, back to an earlier one, no longer recommended, moved away."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError

from kernelpress.errors import PublishError
from kernelpress.hubs import (
    MAIN,
    TYPE,
    RefusedError,
    checked_repo_id,
    content_id,
    explained,
    full_commit,
    heads,
    tree,
)
from kernelpress.notice import notice
from kernelpress.plan import SIGNATURE, STATUS, YANKED, fetch, status_of, versions_of
from kernelpress.variant import METADATA

_Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


@dataclass(frozen=True)
class VersionInfo:
    """A version on the Hub.

    ``source`` is the commit of the sources (with ``+`` where they differed from it), ``yanked`` the reason,
    ``redirect`` where its readers are sent, ``size`` in bytes, ``signed`` whether every variant is.
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
        at = heads(api, repo_id)
        about = api.repo_info(repo_id, repo_type=TYPE)
        found = tuple(_version(api, repo_id, number, at[f"v{number}"]) for number in versions_of(at))
        main = at.get(MAIN, "")
        metadata = _metadata(api, repo_id, main, tuple(tree(api, repo_id, main))) if main else {}
        held = metadata.get("version")
        return RepoInfo(
            repo_id=repo_id,
            url=f"{api.endpoint}/kernels/{repo_id}",
            private=bool(about.private),
            main=main,
            main_version=held if isinstance(held, int) else None,
            versions=found,
        )


def version_at(api: HfApi, repo_id: str, revision: str) -> int:
    """The version whose build a revision holds.

    Raises:
        PublishError: It holds none, or the Hub does not know it or does not answer.
    """
    checked_repo_id(repo_id)
    with explained(api, repo_id):
        at = full_commit(api, repo_id, revision)
        version = _metadata(api, repo_id, at, tuple(tree(api, repo_id, at))).get("version")
    if not isinstance(version, int):
        raise PublishError(f"{revision} of {repo_id} holds no build; name a commit that does")
    return version


def rollback(api: HfApi, repo_id: str, branch: str, to: str) -> str:
    """Give a branch the content of an earlier revision, in a new commit; history stays.

    Args:
        api: The Hub.
        repo_id: The kernel.
        branch: A version's branch, or ``main``.
        to: A commit (its first digits will do), tag or branch of the repository.

    Returns:
        The new commit; the present one where the content is the same already.

    Raises:
        RefusedError: ``to`` holds another version than ``branch`` stands for.
        PublishError: The Hub does not know one of them, refuses, or does not answer.
    """
    version = version_at(api, repo_id, to)
    if branch != MAIN and f"v{version}" != branch:
        raise RefusedError(
            f"{to} holds version {version}, and {branch} cannot: name a commit of {branch} "
            f"(`kernelpress info {repo_id}` lists versions)"
        )
    with explained(api, repo_id):
        commit = full_commit(api, repo_id, to)
    return restore(api, repo_id, branch, commit, f"Roll {branch} back to {to}")


def restore(api: HfApi, repo_id: str, branch: str, to: str, message: str, *, since: str | None = None) -> str:
    """Make a commit on ``branch`` that gives it exactly the files of ``to``; returns the branch's commit.

    ``since`` is the commit that the branch must still be at; by default whichever it is at.

    Raises:
        PublishError: The Hub does not know one of them, refuses, or does not answer.
    """
    with explained(api, repo_id):
        head = since or _head(api, repo_id, branch)
        wanted, there = tree(api, repo_id, to), tree(api, repo_id, head)
        operations: list[_Operation] = [
            CommitOperationCopy(path, path, src_revision=to)
            for path, entry in sorted(wanted.items())
            if path not in there or content_id(there[path]) != content_id(entry)
        ]
        operations += [
            CommitOperationDelete(path, is_folder=False) for path in sorted(there) if path not in wanted
        ]
        if not operations:
            return head
        made = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            repo_type=TYPE,
            revision=branch,
            parent_commit=head,
        )
        return str(made.oid)


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
    names = [f"v{version}"]
    if info(api, repo_id).main_version == version:
        names.append(MAIN)
    text = f"{repo_id} v{version} was yanked by its publisher: {reason}"
    fields: dict[str, str | int] = {"version": version, "reason": reason}
    with explained(api, repo_id):
        return {
            name: commit
            for name in names
            if (commit := _mark(api, repo_id, name, YANKED, fields, text, f"Yank v{version}: {reason}"))
        }


def redirect(api: HfApi, repo_id: str, to: str) -> dict[str, str]:
    """Send the readers of every version to the same version of another repository.

    That is upstream's ``kernel-status.toml``. A loader that does not read it goes on with the files here,
    which warn that the kernel has moved.

    Raises:
        RefusedError: The other repository lacks a version that this one has, or redirects itself.
        PublishError: One of them is not there, or the Hub refuses or does not answer.
    """
    checked_repo_id(repo_id)
    checked_repo_id(to)
    if repo_id == to:
        raise PublishError(f"{repo_id} cannot redirect to itself")
    with explained(api, to):
        there = heads(api, to)
        onward = status_of(api, to, there[MAIN], tree(api, to, there[MAIN]))[1] if MAIN in there else None
    if onward is not None:
        # Nobody follows a second one, and two that name each other lead nowhere.
        raise RefusedError(f"{to} itself redirects to {onward}; name where readers shall end up")
    done: dict[str, str] = {}
    with explained(api, repo_id):
        names = [MAIN, *(f"v{number}" for number in versions_of(heads(api, repo_id)))]
        missing = [name for name in names if name not in there]
        if missing:
            raise RefusedError(
                f"{to} has no {', '.join(missing)}, so readers of {repo_id} would find nothing"
            )
        for name in names:
            fields: dict[str, str | int] = {"kind": "redirect", "destination": to, "revision": name}
            text = f"{repo_id} has moved to {to}"
            commit = _mark(api, repo_id, name, STATUS, fields, text, f"Redirect to {to}")
            if commit is not None:
                done[name] = commit
    return done


def _mark(
    api: HfApi,
    repo_id: str,
    branch: str,
    path: str,
    fields: dict[str, str | int],
    text: str,
    message: str,
) -> str | None:
    """Put a TOML file on a branch and a notice into its variants, unless the same file is there already."""
    # A TOML basic string and a JSON string are the same, as long as JSON escapes what is not ASCII.
    data = "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items()).encode("ascii")
    head = _head(api, repo_id, branch)
    if path in tree(api, repo_id, head) and fetch(api, repo_id, head, path) == data:
        return None
    made = api.create_commit(
        repo_id,
        [CommitOperationAdd(path, data), *notice(api, repo_id, head, text)],
        commit_message=message,
        repo_type=TYPE,
        revision=branch,
        parent_commit=head,
    )
    return str(made.oid)


def _head(api: HfApi, repo_id: str, branch: str) -> str:
    at = heads(api, repo_id)
    if branch not in at:
        raise PublishError(f"{repo_id} has no branch {branch}; it has {', '.join(sorted(at))}")
    return at[branch]


def _version(api: HfApi, repo_id: str, number: int, commit: str) -> VersionInfo:
    files = tree(api, repo_id, commit)
    variants = sorted(
        {path.split("/")[1] for path in files if path.startswith("build/") and path.count("/") > 1}
    )
    metadata = _metadata(api, repo_id, commit, tuple(files))
    provenance = metadata.get("provenance")
    kernel = provenance.get("kernel") if isinstance(provenance, dict) else None
    source = (
        f"{kernel.get('commit')}{'+' if kernel.get('dirty') else ''}" if isinstance(kernel, dict) else None
    )
    yanked, moved = status_of(api, repo_id, commit, files)
    latest = api.list_repo_commits(repo_id, repo_type=TYPE, revision=commit)[0]
    return VersionInfo(
        version=number,
        commit=commit,
        date=latest.created_at.isoformat(),
        variants=tuple(variants),
        size=sum(entry.size for entry in files.values()),
        source=source,
        signed=bool(variants) and all(f"build/{name}/{SIGNATURE}" in files for name in variants),
        yanked=yanked,
        redirect=moved,
    )


def _metadata(api: HfApi, repo_id: str, revision: str, files: Sequence[str]) -> dict[str, object]:
    """The metadata of any variant: what is read of it is the same in all."""
    path = next((path for path in sorted(files) if path.endswith(f"/{METADATA}")), None)
    if path is None:
        return {}
    try:
        fields = json.loads(fetch(api, repo_id, revision, path))
    except (ValueError, RecursionError, EntryNotFoundError):
        return {}
    return fields if isinstance(fields, dict) else {}
