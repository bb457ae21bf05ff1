"""The changes that publishing a build would make to a repository, branch by branch; nothing is changed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from kernelpress.api.baseline import read_variant
from kernelpress.api.compare import ApiChange, compare
from kernelpress.builder.generated import without_provenance
from kernelpress.builder.model import Build
from kernelpress.conventions import CARD, MAIN, METADATA, REPO_TYPE, SIGNATURE, STATUS, YANKED
from kernelpress.errors import PublishError
from kernelpress.hub.client import checked_repo_id, explained, token_of
from kernelpress.hub.repository import (
    branch_heads,
    content_id,
    fetch,
    has_content,
    read_status,
    tree,
    versions_of,
)
from kernelpress.publish.card import render_card


@dataclass(frozen=True)
class Change:
    """One file that would change; sizes are in bytes, ``None`` where there is no file."""

    path: str
    kind: Literal["added", "changed", "removed"]
    before: int | None
    after: int | None


@dataclass(frozen=True)
class BranchPlan:
    """The changes to one branch.

    ``base`` is the commit that the comparison is with: the branch's own, or, where ``exists`` is false, the
    one that it would be made from (``None`` where there is no repository yet). ``base_files`` are the paths that
    ``base`` has, with content ids and sizes. With nothing to add or delete the branch already holds the build.
    """

    name: str
    exists: bool
    base: str | None
    add: Mapping[str, bytes]
    delete: tuple[str, ...]
    base_files: Mapping[str, tuple[str, int]] = field(repr=False)

    @property
    def unchanged(self) -> bool:
        """True if the branch is there and holds the build already."""
        return self.exists and not self.add and not self.delete

    @property
    def changes(self) -> tuple[Change, ...]:
        """The changes to the tree that a reader of this branch sees, in order of their paths."""
        # Who reads a new branch had nothing before, whatever the tree is that it is made from.
        before = {path: size for path, (_, size) in self.base_files.items()} if self.exists else {}
        changes = [
            Change(path, "changed" if path in before else "added", before.get(path), len(data))
            for path, data in self.add.items()
        ]
        changes += [Change(path, "removed", before[path], None) for path in self.delete if path in before]
        return tuple(sorted(changes, key=lambda change: change.path))

    @property
    def base_build(self) -> dict[str, str]:
        """The files of the build that ``base`` has, by content id."""
        return {path: content for path, (content, _) in self.base_files.items() if path.startswith("build/")}


@dataclass(frozen=True)
class Plan:
    """The changes to a repository.

    ``creates`` says that there is no repository yet. ``newer`` is the version that ``main`` keeps, where that
    is a newer one. ``against`` is the published version whose public API was compared with the build's, ``api``
    the differences. ``faults`` are the errors in the build's sources, which forbid publishing; so do ``objections``,
    unless it is forced. ``notes`` are worth knowing.
    """

    repo_id: str
    version: int
    creates: bool
    branches: tuple[BranchPlan, ...]
    newer: int | None
    against: int | None
    api: tuple[ApiChange, ...]
    faults: tuple[str, ...]
    objections: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def implied(self) -> int:
        """The version that the API's changes ask for: the one compared with, or the next after a break."""
        if self.against is None:
            return self.version
        return self.against + any(change.effect == "breaks" for change in self.api)

    @property
    def unchanged(self) -> bool:
        """True if there is nothing to do."""
        return all(branch.unchanged for branch in self.branches)


def plan(build: Build, repo_id: str, api: HfApi) -> Plan:
    """Compare a build with the content of a repository, and change nothing.

    Raises:
        PublishError: The Hub cannot be reached or refuses.
    """
    checked_repo_id(repo_id)
    files = branch_files(build, repo_id)
    own, version = f"v{build.spec.version}", build.spec.version
    faults = tuple(map(str, build.errors))
    notes = _notes(build)
    with explained(api, repo_id):
        try:
            heads = branch_heads(api, repo_id)
        except RepositoryNotFoundError as error:
            # The Hub does not tell a stranger what is private from what does not exist.
            unseen = error.response.status_code == 401 and token_of(api) is None
            if error.response.status_code != 404 and not unseen:
                raise
            if unseen:
                notes += (
                    f"cannot see {repo_id} without a token; this is the plan for a repository that is new",
                )
            branches = tuple(BranchPlan(name, False, None, files, (), {}) for name in (own, MAIN))
            return Plan(repo_id, version, True, branches, None, None, (), faults, (), notes)
        if MAIN not in heads:
            raise PublishError(f"{repo_id} has no branch main, which every repository on the Hub has")
        newest = max(versions_of(heads), default=version)
        newer = newest if newest > version else None
        names = [own] if newer is not None else [own, MAIN]
        branches = tuple(plan_branch(api, repo_id, name, heads, files) for name in names)
        against, changes = _compare_api(build, repo_id, api, heads, branches[0])
        objections = _objections(build, repo_id, api, branches)
    if against == version:
        objections += tuple(
            f"{own} breaks what it promised, {change}: raise the version in build.toml"
            for change in changes
            if change.effect == "breaks"
        )
    return Plan(repo_id, version, False, branches, newer, against, changes, faults, objections, notes)


def branch_files(build: Build, repo_id: str) -> dict[str, bytes]:
    """Every file that a branch with this build has to hold, by its path there."""
    files = {
        f"build/{variant.name}/{file.path}": file.data for variant in build.variants for file in variant.files
    }
    for variant in build.variants:
        # A signature is made after the build and lies beside it; it signs the metadata as it stands there.
        signature = build.directory / variant.name / SIGNATURE
        metadata = build.directory / variant.name / METADATA
        if signature.is_file() and metadata.read_bytes() == files[f"build/{variant.name}/{METADATA}"]:
            files[f"build/{variant.name}/{SIGNATURE}"] = signature.read_bytes()
    return files | build.source.pictures | {CARD: render_card(build, repo_id).encode("utf-8")}


def plan_branch(
    api: HfApi, repo_id: str, name: str, heads: Mapping[str, str], files: Mapping[str, bytes]
) -> BranchPlan:
    """The changes that make a branch hold ``files``; ``heads`` are all branches and their commits."""
    base = heads.get(name, heads[MAIN])
    entries = tree(api, repo_id, base)
    add = {
        path: data
        for path, data in files.items()
        if path not in entries or not has_content(entries[path], data)
    }
    # The status speaks of what stood here before: a yanked build, or an address that has moved.
    delete = tuple(
        sorted(
            path
            for path in entries
            if path not in files and (path.startswith("build/") or path in (STATUS, YANKED))
        )
    )
    if all(path.endswith(f"/{SIGNATURE}") for path in delete) and all(
        path in entries and _same_but_provenance(api, repo_id, base, path, data)
        for path, data in add.items()
        if not path.endswith(f"/{SIGNATURE}")
    ):
        # Who rebuilds what is published and cannot sign it must not take the signature away; and a new
        # one over the same content is no reason to commit.
        add, delete = {}, ()
    base_files = {path: (content_id(entry), entry.size) for path, entry in entries.items()}
    return BranchPlan(name, name in heads, base, add, delete, base_files)


def _same_but_provenance(api: HfApi, repo_id: str, revision: str, path: str, data: bytes) -> bool:
    if path.rpartition("/")[2] != METADATA:
        return False
    try:
        return without_provenance(fetch(api, repo_id, revision, path)) == without_provenance(data)
    except ValueError:
        return False


def _compare_api(
    build: Build, repo_id: str, api: HfApi, heads: Mapping[str, str], own: BranchPlan
) -> tuple[int | None, tuple[ApiChange, ...]]:
    """The version that readers of this one come from, and how its public API differs."""
    against = max((version for version in versions_of(heads) if version <= build.spec.version), default=None)
    if against is None or own.unchanged:
        return None, ()
    base = heads[f"v{against}"]
    paths = [path for path in tree(api, repo_id, base) if path.startswith("build/") and path.endswith(".py")]
    variants = sorted({path.split("/")[1] for path in paths})
    flat = next((name for name in variants if not name.endswith("-universal")), None) or next(
        iter(variants), None
    )
    if flat is None:
        return None, ()
    with tempfile.TemporaryDirectory(prefix="kernelpress-") as scratch:
        patterns = f"build/{flat}/*.py"
        api.snapshot_download(
            repo_id, repo_type=REPO_TYPE, revision=base, local_dir=scratch, allow_patterns=patterns
        )
        old = read_variant(Path(scratch, "build", flat))
    return against, compare(old, {file.path: file.data for file in build.variants[0].files})


def _objections(build: Build, repo_id: str, api: HfApi, branches: tuple[BranchPlan, ...]) -> tuple[str, ...]:
    objections = []
    git = build.source.git
    for branch in branches:
        if branch.unchanged or branch.base is None:
            continue
        replaces = branch.exists and bool(branch.base_build)
        if replaces and branch.name != MAIN and git is not None and git.dirty:
            objections.append(
                f"{branch.name} is published and the sources differ from commit {git.commit[:12]}: commit them first"
            )
        yanked, redirect = read_status(api, repo_id, branch.base, branch.base_files)
        if redirect is not None:
            objections.append(f"{branch.name} redirects its readers to {redirect}: publish there")
        elif yanked is not None and branch.exists and branch.name != MAIN:
            objections.append(f"{branch.name} was yanked ({yanked}): raise the version in build.toml")
    return tuple(objections)


def _notes(build: Build) -> tuple[str, ...]:
    if build.source.git is None:
        return ("the sources are in no git repository, so nobody can tell later what this was built from",)
    if build.source.git.dirty:
        return (f"the sources differ from commit {build.source.git.commit[:12]}",)
    return ()
