"""Publishes as one act: change the Hub, prove it as a consumer, or put everything back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from huggingface_hub import HfApi

from kernelpress.builder.model import Build
from kernelpress.conventions import MAIN, REPO_TYPE
from kernelpress.errors import PublishError
from kernelpress.hub.client import MovedError, checked_repo_id, explained
from kernelpress.hub.repository import branch_heads, restore
from kernelpress.probe.environment import lacks_torch
from kernelpress.publish.journal import Journal
from kernelpress.publish.publish import DEFAULTS, Published, PublishedBranch, PublishOptions, publish
from kernelpress.publish.verify import Verification, verify


@dataclass(frozen=True)
class Release:
    """The outcome of publishing and verifying; ``seen`` is ``None`` where these commits were verified before."""

    published: Published
    seen: Verification | None


def release(
    build: Build,
    repo_id: str | None,
    api: HfApi,
    options: PublishOptions = DEFAULTS,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Release:
    """Publish a build and verify it; arguments as for ``publish``.

    A release of an earlier run that was killed before it had verified is verified now, and taken back if it fails.

    Raises:
        PublishError: This environment cannot verify a release, and nothing was published. Or publishing failed; or
            verifying did, and then every branch that was changed has its former content back, unless the message says
            otherwise.
    """
    repo_id = checked_repo_id(repo_id or build.spec.repo_id)
    if not options.create_pr and lacks_torch():
        raise PublishError(
            "this environment lacks torch, without which a release cannot be verified, so nothing was published; "
            "install it with `pip install torch`, then publish again"
        )
    journal = Journal.of(api.endpoint, repo_id, build.content_hash)
    published = publish(build, repo_id, api, options, say=say, before_change=journal.changing)
    if published.pull_request is not None:
        return Release(published, None)
    own = next(branch for branch in published.branches if branch.name != MAIN)
    commits = list(dict.fromkeys([own.commit, *(branch.commit for branch in published.branches)]))
    if not published.changed and journal.has_verified(commits):
        return Release(published, None)
    say(f"{'published' if published.changed else 'not known to be verified'}; fetching it as a consumer")
    verification = verify(api, repo_id, commits, build.spec.version)
    if verification.faults:
        before = journal.before | {
            branch.name: branch.before for branch in published.branches if branch.changed
        }
        restored = [
            _put_back(branch, before[branch.name], repo_id, api)
            for branch in published.branches
            if branch.name in before
        ]
        journal.settled()
        raise PublishError(
            f"a consumer cannot use what {'was published' if restored else f'{repo_id} holds'}: "
            f"{'; '.join(verification.faults)}. {'; '.join(restored) or _left(own, repo_id)}"
        )
    journal.verified(commits)
    return Release(published, verification)


def _left(own: PublishedBranch, repo_id: str) -> str:
    return (
        f"It was not published by this run and stays; `kernelpress rollback {repo_id} --to COMMIT` brings {own.name} "
        "back to an earlier commit"
    )


def _follows(commit: str, before: str, repo_id: str, api: HfApi) -> bool:
    """True if a commit is the next one after another; the journal of an earlier run may be out of date."""
    history = api.list_repo_commits(repo_id, repo_type=REPO_TYPE, revision=commit)
    return len(history) > 1 and history[1].commit_id == before


def _put_back(branch: PublishedBranch, before: str | None, repo_id: str, api: HfApi) -> str:
    """Undo the change of a branch; returns a sentence about how that went."""
    left_alone = f"{branch.name} was changed by somebody else since and is left alone"
    try:
        with explained(api, repo_id):
            if branch_heads(api, repo_id).get(branch.name) != branch.commit:
                return left_alone
            if before is not None and not _follows(branch.commit, before, repo_id, api):
                return left_alone
            if before is None:
                # The Hub removes a branch wherever it is by then, so this was asked in the last moment.
                api.delete_branch(repo_id, branch=branch.name, repo_type=REPO_TYPE)
                return f"{branch.name}, which was new, is removed again"
        message = "Restored: the commit before did not load"
        restore(api, repo_id, branch.name, before, message, base=branch.commit)
    except MovedError:
        return left_alone
    except PublishError as error:
        return f"{branch.name} could NOT be restored to {before}: {error.message}"
    return f"{branch.name} holds what {before[:12]} held again"
