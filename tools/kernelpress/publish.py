"""Sixth step: a build on its version's branch of the Hub, and on ``main`` if it is the newest.

A branch only ever moves in one commit, made on the revision it was compared with; whoever reads it sees the
whole of one build or the whole of another. Nothing is remembered between two attempts but what the Hub itself
shows, so an attempt that was cut off anywhere is finished by the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from kernelpress.errors import PublishError
from kernelpress.hubs import (
    MAIN,
    TYPE,
    MovedError,
    RefusedError,
    TransientError,
    checked_repo_id,
    explained,
    hub,
    staging,
)
from kernelpress.plan import BranchPlan, Plan, plan
from kernelpress.proposed import proposed
from kernelpress.source_rules import check_sources
from kernelpress.variant import Build

__all__ = ["Published", "PublishedBranch", "hub", "plan", "publish"]

_ATTEMPTS = 6
_FIRST_WAIT = 0.5


@dataclass(frozen=True)
class PublishedBranch:
    """Where a branch stands after publishing.

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
    """The outcome of publishing a build. ``overridden`` is what ``force`` set aside, and ``opened`` is false for a pull
    request that was there before."""

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
        """Whether anything was published."""
        return (self.pull_request is not None and self.opened) or any(
            branch.changed for branch in self.branches
        )


def publish(
    build: Build,
    repo_id: str | None,
    api: HfApi,
    *,
    private: bool = False,
    force: bool = False,
    create_pr: bool = False,
    say: Callable[[str], None] = lambda text: None,
    changing: Callable[[str, str | None], None] = lambda branch, before: None,
) -> Published:
    """Put a build on the Hub, then read it back and compare.

    When the Hub or the connection fails for a moment, or another commit comes in between, the plan is made
    anew from what the Hub shows then, with growing pauses.

    Args:
        build: What to publish.
        repo_id: ``organization/name``; by default the one in ``build.toml``.
        api: The Hub.
        private: Whether a repository that does not exist yet is made private.
        force: Publish in spite of the plan's objections.
        create_pr: Propose the change of ``main`` as a pull request instead of making any, unless one holds this build
            already and ``force`` does not ask for another.
        say: Told about every pause and every new plan.
        changing: Told of each branch that is about to change, and the commit that it is at (``None``: it is new).

    Raises:
        RefusedError: The sources have faults, the plan has objections, or somebody else published another build
            meanwhile.
        PublishError: The Hub cannot be reached or refuses. Branches already committed are named in the
            message; all others are as they were.
    """
    repo_id = checked_repo_id(repo_id or build.spec.repo_id)
    faults = source_faults(build)
    if faults:
        raise RefusedError(f"the sources cannot be published: {'; '.join(faults)}")
    attempt = _Attempt(build, repo_id, api, private, force, create_pr, changing)
    for number in range(_ATTEMPTS):
        try:
            return attempt.run()
        except (TransientError, MovedError) as error:
            last = number + 1 == _ATTEMPTS
            if last or (isinstance(error, TransientError) and not error.reached and not attempt.reached):
                raise attempt.with_landed(error) from error
            wait = error.wait if isinstance(error, TransientError) and error.wait is not None else None
            wait = _FIRST_WAIT * 2**number if wait is None else wait
            say(f"{error.message}; trying again in {wait:.1f} s")
            time.sleep(wait)
        except PublishError as error:
            raise attempt.with_landed(error) from error
    raise AssertionError("the last attempt returns or raises")


def source_faults(build: Build) -> tuple[str, ...]:
    """The errors that ``check`` finds in a build's sources; they forbid publishing, whatever is forced."""
    return tuple(str(found) for found in check_sources(build.spec) if found.severity == "error")


class _Attempt:
    """Publishing, until it is through: what the first plan saw, and what has been done since."""

    def __init__(
        self,
        build: Build,
        repo_id: str,
        api: HfApi,
        private: bool,
        force: bool,
        create_pr: bool,
        changing: Callable[[str, str | None], None],
    ) -> None:
        self._build, self._repo_id, self._api = build, repo_id, api
        self._private, self._force, self._create_pr = private, force, create_pr
        self._changing = changing
        self._first: dict[str, BranchPlan] = {}
        self._landed: dict[str, PublishedBranch] = {}
        self.reached = False

    def run(self) -> Published:
        todo = plan(self._build, self._repo_id, self._api)
        self.reached = True
        if todo.creates:
            with explained(self._api, self._repo_id):
                self._api.create_repo(self._repo_id, repo_type=TYPE, private=self._private, exist_ok=True)
            todo = plan(self._build, self._repo_id, self._api)
        if todo.objections and not self._force:
            raise RefusedError(f"{'; '.join(todo.objections)}; or override with --force")
        self._refuse_to_mix(todo)
        if self._create_pr:
            return self._propose(todo)
        # A new version's branch is made from main's new commit: so it never shows anything but the build.
        for each in sorted(todo.branches, key=lambda branch: branch.name != MAIN):
            self._apply(each, todo)
        again = plan(self._build, self._repo_id, self._api) if self._landed else todo
        branches = tuple(self._outcome(each) for each in again.branches)
        self._read_back(again)
        return self._published(todo, branches)

    def with_landed(self, error: PublishError) -> PublishError:
        """The same error, with what was published before it."""
        if self._landed:
            error.message += f"; published before that: {', '.join(sorted(self._landed))}"
            error.args = (str(error),)
        return error

    def _refuse_to_mix(self, todo: Plan) -> None:
        for branch in todo.branches:
            first = self._first.setdefault(branch.name, branch)
            ours = not (branch.add or branch.delete) or branch.name in self._landed
            if not ours and not branch.same_build(first):
                raise RefusedError(
                    f"somebody else changed {branch.name} of {self._repo_id} meanwhile: it holds another build now, "
                    f"commit {(branch.base or '')[:12]}; look at what they published, then publish again"
                )

    def _apply(self, todo: BranchPlan, whole: Plan) -> None:
        if todo.unchanged:
            return
        assert todo.base is not None
        if todo.name not in self._landed:
            self._changing(todo.name, todo.base if todo.exists else None)
        with explained(self._api, self._repo_id):
            if todo.exists:
                commit = self._commit(todo, todo.name)
            elif MAIN in self._landed or not (todo.add or todo.delete):
                landed = self._landed.get(MAIN)
                commit = todo.base if landed is None else landed.commit
                self._api.create_branch(self._repo_id, branch=todo.name, revision=commit, repo_type=TYPE)
            else:
                commit = self._commit_aside(todo)
        before = self._landed[todo.name].before if todo.name in self._landed else None
        self._landed[todo.name] = PublishedBranch(
            name=todo.name,
            commit=commit,
            changed=True,
            added=len(todo.add),
            deleted=len(todo.delete),
            url=f"{self._api.endpoint}/kernels/{self._repo_id}/tree/{todo.name}",
            before=before or (todo.base if todo.exists else None),
        )

    def _commit_aside(self, todo: BranchPlan) -> str:
        # For a version older than main's.
        assert todo.base is not None
        name = f"{todo.name}-{self._build.content_hash}"
        with staging(self._api, self._repo_id, name, todo.base) as aside:
            commit = self._commit(todo, aside)
            self._api.create_branch(self._repo_id, branch=todo.name, revision=commit, repo_type=TYPE)
        return commit

    def _commit(self, todo: BranchPlan, branch: str, *, create_pr: bool = False) -> str:
        git = self._build.source.git
        made = self._api.create_commit(
            self._repo_id,
            [
                *(CommitOperationAdd(path, data) for path, data in sorted(todo.add.items())),
                *(CommitOperationDelete(path, is_folder=False) for path in todo.delete),
            ],
            commit_message=f"{self._build.spec.name} v{self._build.spec.version}: build {self._build.content_hash}",
            commit_description=f"Sources: commit {git.commit}{', modified' if git.dirty else ''}"
            if git
            else "",
            repo_type=TYPE,
            revision=branch,
            parent_commit=todo.base,
            create_pr=create_pr,
        )
        return (made.pr_url or made.commit_url) if create_pr else made.oid

    def _propose(self, todo: Plan) -> Published:
        main = next((branch for branch in todo.branches if branch.name == MAIN), None)
        if main is None:
            raise RefusedError(
                f"{self._repo_id} holds the newer version {todo.newer}, and the Hub takes pull requests for main only"
            )
        if main.unchanged:
            return self._published(todo, tuple(self._outcome(each) for each in todo.branches))
        before = None if self._force else proposed(self._build, self._repo_id, self._api)
        if before is not None:
            return replace(self._published(todo, (), before), opened=False)
        try:
            with explained(self._api, self._repo_id):
                url = self._commit(main, MAIN, create_pr=True)
        except TransientError as error:
            # It may be open by now; the next run looks for it.
            raise PublishError(
                f"{error.message}; run this again, which opens one if it is not there yet"
            ) from error
        return self._published(todo, (), url)

    def _outcome(self, todo: BranchPlan) -> PublishedBranch:
        if todo.name in self._landed:
            return self._landed[todo.name]
        url = f"{self._api.endpoint}/kernels/{self._repo_id}/tree/{todo.name}"
        first = self._first[todo.name]
        # A commit whose answer was lost is known by what it did.
        changed = not first.unchanged
        before = first.base if first.exists else None
        return PublishedBranch(
            todo.name, todo.base or "", changed, len(first.add), len(first.delete), url, before
        )

    def _published(
        self, todo: Plan, branches: tuple[PublishedBranch, ...], pull_request: str | None = None
    ) -> Published:
        url = f"{self._api.endpoint}/kernels/{self._repo_id}"
        return Published(self._repo_id, url, branches, todo.newer, todo.objections, todo.notes, pull_request)

    def _read_back(self, again: Plan) -> None:
        for branch in again.branches:
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
