"""Publishing as one act: change the Hub, prove it as a consumer, or put everything back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from huggingface_hub import HfApi

from kernelpress.errors import PublishError
from kernelpress.history import restore
from kernelpress.hubs import MAIN, TYPE, explained, heads
from kernelpress.publish import Published, PublishedBranch, publish
from kernelpress.variant import Build
from kernelpress.verify import Seen, verify


@dataclass(frozen=True)
class Release:
    """What was published, and what a consumer saw of it; ``seen`` is ``None`` where nothing was new."""

    published: Published
    seen: Seen | None


def release(
    build: Build,
    repo_id: str | None,
    api: HfApi,
    *,
    private: bool = False,
    force: bool = False,
    create_pr: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Release:
    """Publish a build and verify it; arguments as for ``publish``.

    Raises:
        PublishError: Publishing failed; or verifying did, and then every branch that was changed has its
            former content back, unless the message says otherwise.
    """
    done = publish(build, repo_id, api, private=private, force=force, create_pr=create_pr, say=say)
    if not done.changed or done.pull_request is not None:
        return Release(done, None)
    say("published; fetching it as a consumer")
    own = next(branch for branch in done.branches if branch.name != MAIN)
    others = [branch.commit for branch in done.branches if branch is not own and branch.changed]
    seen = verify(api, done.repo_id, [own.commit, *others], build.spec.version)
    if seen.faults:
        restored = [_put_back(branch, done.repo_id, api) for branch in done.branches if branch.changed]
        raise PublishError(
            f"a consumer cannot use what was published: {'; '.join(seen.faults)}. {'; '.join(restored)}"
        )
    return Release(done, seen)


def _put_back(branch: PublishedBranch, repo_id: str, api: HfApi) -> str:
    try:
        with explained(api, repo_id):
            if heads(api, repo_id).get(branch.name) != branch.commit:
                return f"{branch.name} was changed by somebody else since and is left alone"
            if branch.before is None:
                api.delete_branch(repo_id, branch=branch.name, repo_type=TYPE)
                return f"{branch.name}, which was new, is removed again"
        message = "Restored: the commit before did not load"
        restore(api, repo_id, branch.name, branch.before, message, since=branch.commit)
    except PublishError as error:
        return f"{branch.name} could NOT be restored to {branch.before}: {error.message}"
    return f"{branch.name} holds what {branch.before[:12]} held again"
