"""Puts a build on its version's branch of the Hub, and on ``main`` if it is the newest.

A branch only ever moves in one commit, made on the revision it was compared with; whoever reads it sees the
whole of one build or the whole of another. Nothing is remembered between two attempts but what the Hub itself
shows, so an attempt that was cut off anywhere is finished by the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from kernelpress.builder.model import Build
from kernelpress.conventions import MAIN, REPO_TYPE
from kernelpress.errors import PublishError
from kernelpress.hub.client import MovedError, RefusedError, TransientError, checked_repo_id, explained
from kernelpress.hub.repository import staging_branch
from kernelpress.publish.plan import BranchPlan, Plan, plan
from kernelpress.publish.pull_request import find_pull_request

_ATTEMPTS = 6
_FIRST_WAIT = 0.5


@dataclass(frozen=True)
class PublishOptions:
    """The choices of whoever publishes.

    Args:
        private: Make a repository private that does not exist yet.
        force: Publish in spite of the plan's objections.
        create_pr: Propose the change of ``main`` as a pull request instead of making any, unless one holds this build
            already and ``force`` does not ask for another.
    """

    private: bool = False
    force: bool = False
    create_pr: bool = False


DEFAULTS = PublishOptions()


@dataclass(frozen=True)
class PublishedBranch:
    """The state of a branch after publishing.

    ``changed`` is false if it held the build before; ``before`` is the commit it was at then, ``None`` for a
    branch that is new.
    """

    name: str
    commit: str
    changed: bool
    added: int
    deleted: int
    url: str
    before: str | None = None


@dataclass(frozen=True)
class Published:
    """The outcome of publishing a build.

    ``overridden`` are the objections that ``force`` set aside, and ``opened`` is false for a pull request that was
    there before.
    """

    repo_id: str
    url: str
    branches: tuple[PublishedBranch, ...]
    newer: int | None
    overridden: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pull_request: str | None = None
    opened: bool = True

    @property
    def changed(self) -> bool:
        """True if anything was published."""
        return (self.pull_request is not None and self.opened) or any(
            branch.changed for branch in self.branches
        )


def publish(
    build: Build,
    repo_id: str | None,
    api: HfApi,
    options: PublishOptions = DEFAULTS,
    *,
    say: Callable[[str], None] = lambda text: None,
    before_change: Callable[[str, str | None], None] = lambda branch, commit: None,
) -> Published:
    """Put a build on the Hub, then read it back and compare.

    When the Hub or the connection fails for a moment, or another commit comes in between, the plan is made
    anew from what the Hub shows then, with growing pauses.

    Args:
        build: The build.
        repo_id: ``organization/name``; by default the one in ``build.toml``.
        api: The Hub.
        options: The publisher's choices.
        say: Called with a line about every pause and every new plan.
        before_change: Called with each branch that is about to change, and the commit that it is at (``None``: it is
            new).

    Raises:
        RefusedError: The sources have faults, the plan has objections, or somebody else published another build
            meanwhile.
        PublishError: The Hub cannot be reached or refuses. Branches already committed are named in the
            message; all others are as they were.
    """
    repo_id = checked_repo_id(repo_id or build.spec.repo_id)
    if build.errors:
        raise RefusedError(f"the sources cannot be published: {'; '.join(map(str, build.errors))}")
    publication = _Publication(build, repo_id, api, options, before_change)
    for attempt in range(_ATTEMPTS):
        try:
            return publication.run()
        except (TransientError, MovedError) as error:
            last = attempt + 1 == _ATTEMPTS
            if last or (
                isinstance(error, TransientError) and not error.reached and not publication.hub_reached
            ):
                raise publication.with_landed(error) from error
            wait = error.wait if isinstance(error, TransientError) and error.wait is not None else None
            wait = _FIRST_WAIT * 2**attempt if wait is None else wait
            say(f"{error.message}; trying again in {wait:.1f} s")
            time.sleep(wait)
        except PublishError as error:
            raise publication.with_landed(error) from error
    raise AssertionError("the last attempt returns or raises")


class _Publication:
    """One build on its way to the Hub, over all attempts: the first plan of each branch, and the commits made since."""

    def __init__(
        self,
        build: Build,
        repo_id: str,
        api: HfApi,
        options: PublishOptions,
        before_change: Callable[[str, str | None], None],
    ) -> None:
        self._build, self._repo_id, self._api, self._options = build, repo_id, api, options
        self._before_change = before_change
        self._first: dict[str, BranchPlan] = {}
        self._landed: dict[str, PublishedBranch] = {}
        self.hub_reached = False

    def run(self) -> Published:
        todo = plan(self._build, self._repo_id, self._api)
        self.hub_reached = True
        if todo.creates:
            with explained(self._api, self._repo_id):
                self._api.create_repo(
                    self._repo_id, repo_type=REPO_TYPE, private=self._options.private, exist_ok=True
                )
            todo = plan(self._build, self._repo_id, self._api)
        if todo.objections and not self._options.force:
            raise RefusedError(f"{'; '.join(todo.objections)}; or override with --force")
        self._refuse_to_mix(todo)
        if self._options.create_pr:
            return self._propose(todo)
        # A new version's branch is made from main's new commit: so it never shows anything but the build.
        for branch in sorted(todo.branches, key=lambda branch: branch.name != MAIN):
            self._apply(branch)
        after = plan(self._build, self._repo_id, self._api) if self._landed else todo
        branches = tuple(self._outcome(branch) for branch in after.branches)
        self._compare_after(after)
        return self._published(todo, branches)

    def with_landed(self, error: PublishError) -> PublishError:
        """The same error, with the branches that were published before it."""
        if self._landed:
            error.message += f"; published before that: {', '.join(sorted(self._landed))}"
            error.args = (str(error),)
        return error

    def _refuse_to_mix(self, todo: Plan) -> None:
        for branch in todo.branches:
            first = self._first.setdefault(branch.name, branch)
            ours = not (branch.add or branch.delete) or branch.name in self._landed
            if not ours and branch.base_build != first.base_build:
                raise RefusedError(
                    f"somebody else changed {branch.name} of {self._repo_id} meanwhile: it holds another build now, "
                    f"commit {(branch.base or '')[:12]}; look at what they published, then publish again"
                )

    def _apply(self, branch: BranchPlan) -> None:
        if branch.unchanged:
            return
        assert branch.base is not None
        if branch.name not in self._landed:
            self._before_change(branch.name, branch.base if branch.exists else None)
        with explained(self._api, self._repo_id):
            if branch.exists:
                commit = self._commit(branch, branch.name)
            elif MAIN in self._landed or not (branch.add or branch.delete):
                commit = self._landed[MAIN].commit if MAIN in self._landed else branch.base
                self._api.create_branch(
                    self._repo_id, branch=branch.name, revision=commit, repo_type=REPO_TYPE
                )
            else:
                commit = self._commit_aside(branch)
        earlier = self._landed[branch.name].before if branch.name in self._landed else None
        self._landed[branch.name] = PublishedBranch(
            name=branch.name,
            commit=commit,
            changed=True,
            added=len(branch.add),
            deleted=len(branch.delete),
            url=self._branch_url(branch.name),
            before=earlier or (branch.base if branch.exists else None),
        )

    def _commit_aside(self, branch: BranchPlan) -> str:
        # For a version older than main's.
        assert branch.base is not None
        name = f"{branch.name}-{self._build.content_hash}"
        with staging_branch(self._api, self._repo_id, name, branch.base) as staging:
            commit = self._commit(branch, staging)
            self._api.create_branch(self._repo_id, branch=branch.name, revision=commit, repo_type=REPO_TYPE)
        return commit

    def _commit(self, branch: BranchPlan, revision: str, *, create_pr: bool = False) -> str:
        git = self._build.source.git
        commit = self._api.create_commit(
            self._repo_id,
            [
                *(CommitOperationAdd(path, data) for path, data in sorted(branch.add.items())),
                *(CommitOperationDelete(path, is_folder=False) for path in branch.delete),
            ],
            commit_message=f"{self._build.spec.name} v{self._build.spec.version}: build {self._build.content_hash}",
            commit_description=f"Sources: commit {git.commit}{', modified' if git.dirty else ''}"
            if git
            else "",
            repo_type=REPO_TYPE,
            revision=revision,
            parent_commit=branch.base,
            create_pr=create_pr,
        )
        return (commit.pr_url or commit.commit_url) if create_pr else commit.oid

    def _propose(self, todo: Plan) -> Published:
        main = next((branch for branch in todo.branches if branch.name == MAIN), None)
        if main is None:
            raise RefusedError(
                f"{self._repo_id} holds the newer version {todo.newer}, and the Hub takes pull requests for main only"
            )
        if main.unchanged:
            return self._published(todo, tuple(self._outcome(branch) for branch in todo.branches))
        earlier = None if self._options.force else find_pull_request(self._build, self._repo_id, self._api)
        if earlier is not None:
            return replace(self._published(todo, (), earlier), opened=False)
        try:
            with explained(self._api, self._repo_id):
                url = self._commit(main, MAIN, create_pr=True)
        except TransientError as error:
            # It may be open by now; the next run looks for it.
            raise PublishError(
                f"{error.message}; run this again, which opens one if it is not there yet"
            ) from error
        return self._published(todo, (), url)

    def _outcome(self, branch: BranchPlan) -> PublishedBranch:
        if branch.name in self._landed:
            return self._landed[branch.name]
        first = self._first[branch.name]
        return PublishedBranch(
            name=branch.name,
            commit=branch.base or "",
            # A commit whose answer was lost is known by what it did.
            changed=not first.unchanged,
            added=len(first.add),
            deleted=len(first.delete),
            url=self._branch_url(branch.name),
            before=first.base if first.exists else None,
        )

    def _branch_url(self, branch: str) -> str:
        return f"{self._api.endpoint}/kernels/{self._repo_id}/tree/{branch}"

    def _published(
        self, todo: Plan, branches: tuple[PublishedBranch, ...], pull_request: str | None = None
    ) -> Published:
        url = f"{self._api.endpoint}/kernels/{self._repo_id}"
        return Published(self._repo_id, url, branches, todo.newer, todo.objections, todo.notes, pull_request)

    def _compare_after(self, after: Plan) -> None:
        for branch in after.branches:
            landed = self._landed.get(branch.name)
            if landed is not None and branch.base != landed.commit:
                raise RefusedError(
                    f"{branch.name} of {self._repo_id} is no longer at {landed.commit[:12]}: somebody else has changed "
                    "it since; look at what they published, then publish again"
                )
            if not branch.unchanged:
                raise PublishError(
                    f"{branch.name} of {self._repo_id} does not hold what was sent; publish again"
                )
