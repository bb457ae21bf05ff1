"""What publishing would do, branch by branch, worked out without changing anything."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tomli
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from kernelpress.card import render_card
from kernelpress.contract import ApiChange, compare
from kernelpress.errors import PublishError
from kernelpress.hubs import MAIN, TYPE, checked_repo_id, content_id, explained, heads, token_of, tree
from kernelpress.published import read_variant
from kernelpress.variant import METADATA, Build, without_provenance

CARD = "README.md"
STATUS = "kernel-status.toml"
SIGNATURE = f"{METADATA}.sigstore"
YANKED = "kernel-yanked.toml"
# The one way to write each number: `v01` is a branch like any other.
VERSION_BRANCH = re.compile(r"v(0|[1-9][0-9]{0,9})")


@dataclass(frozen=True)
class Change:
    """One file that would change; sizes are in bytes, ``None`` where there is no file."""

    path: str
    kind: Literal["added", "changed", "removed"]
    before: int | None
    after: int | None


@dataclass(frozen=True)
class BranchPlan:
    """What would change on a branch.

    ``base`` is the commit that the comparison is with: the branch's own, or, where ``exists`` is false, the
    one that it would be made from (``None`` where there is no repository yet). ``held`` is what ``base`` has:
    paths, with content ids and sizes. With nothing to add or delete the branch already holds the build.
    """

    name: str
    exists: bool
    base: str | None
    add: Mapping[str, bytes]
    delete: tuple[str, ...]
    held: Mapping[str, tuple[str, int]] = field(repr=False)

    @property
    def unchanged(self) -> bool:
        """Whether the branch is there and holds the build already."""
        return self.exists and not self.add and not self.delete

    @property
    def changes(self) -> tuple[Change, ...]:
        """The changes to the tree that a reader of this branch sees, in order of their paths."""
        # Who reads a new branch had nothing before, whatever the tree is that it is made from.
        before = {path: size for path, (_, size) in self.held.items()} if self.exists else {}
        found = [
            Change(path, "changed" if path in before else "added", before.get(path), len(data))
            for path, data in self.add.items()
        ]
        found += [Change(path, "removed", before[path], None) for path in self.delete if path in before]
        return tuple(sorted(found, key=lambda change: change.path))

    def same_build(self, other: BranchPlan) -> bool:
        """Whether both bases hold the same build, whatever else they hold."""
        return _build_of(self.held) == _build_of(other.held)


@dataclass(frozen=True)
class Plan:
    """What publishing would do.

    ``creates`` says that there is no repository yet. ``newer`` is the version that ``main`` keeps, where that
    is a newer one. ``against`` is the published version whose public API was compared with the build's, ``api``
    what differs. ``objections`` forbid publishing unless it is forced. ``notes`` are worth knowing.
    """

    repo_id: str
    version: int
    creates: bool
    branches: tuple[BranchPlan, ...]
    newer: int | None
    against: int | None
    api: tuple[ApiChange, ...]
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
        """Whether there is nothing to do."""
        return all(branch.unchanged for branch in self.branches)


def plan(build: Build, repo_id: str, api: HfApi) -> Plan:
    """Compare a build with what a repository holds, and change nothing.

    Raises:
        PublishError: The Hub cannot be reached or refuses.
    """
    checked_repo_id(repo_id)
    wanted = wanted_files(build, repo_id)
    own = f"v{build.spec.version}"
    notes = _notes(build)
    with explained(api, repo_id):
        try:
            at = heads(api, repo_id)
        except RepositoryNotFoundError as error:
            # The Hub does not tell a stranger what is private from what does not exist.
            unseen = error.response.status_code == 401 and token_of(api) is None
            if error.response.status_code != 404 and not unseen:
                raise
            if unseen:
                notes += (
                    f"cannot see {repo_id} without a token; this is the plan for a repository that is new",
                )
            fresh = tuple(BranchPlan(name, False, None, wanted, (), {}) for name in (own, MAIN))
            return Plan(repo_id, build.spec.version, True, fresh, None, None, (), (), notes)
        if MAIN not in at:
            raise PublishError(f"{repo_id} has no branch main, which every repository on the Hub has")
        newest = max(versions_of(at), default=build.spec.version)
        newer = newest if newest > build.spec.version else None
        names = [own] if newer is not None else [own, MAIN]
        branches = tuple(plan_branch(api, repo_id, name, at, wanted) for name in names)
        against, changes = _api(build, repo_id, api, at, branches[0])
        objections = _objections(build, repo_id, api, branches)
    if against == build.spec.version:
        objections += tuple(
            f"{own} breaks what it promised, {change}: raise the version in build.toml"
            for change in changes
            if change.effect == "breaks"
        )
    return Plan(repo_id, build.spec.version, False, branches, newer, against, changes, objections, notes)


def versions_of(names: Mapping[str, str]) -> list[int]:
    """The versions among branch names, in order."""
    return sorted(int(match[1]) for name in names if (match := VERSION_BRANCH.fullmatch(name)))


def wanted_files(build: Build, repo_id: str) -> dict[str, bytes]:
    """Everything a branch with this build has to hold."""
    files = {
        f"build/{variant.name}/{file.path}": file.data for variant in build.variants for file in variant.files
    }
    for variant in build.variants:
        # A signature is made after the build and lies beside it; it signs the metadata as it stands there.
        bundle = build.directory / variant.name / SIGNATURE
        metadata = build.directory / variant.name / METADATA
        if bundle.is_file() and metadata.read_bytes() == files[f"build/{variant.name}/{METADATA}"]:
            files[f"build/{variant.name}/{SIGNATURE}"] = bundle.read_bytes()
    return files | {CARD: render_card(build, repo_id).encode("utf-8")}


def status_of(
    api: HfApi, repo_id: str, revision: str, files: Mapping[str, object]
) -> tuple[str | None, str | None]:
    """Why a revision was yanked, and where it redirects to; ``None`` for what it does not do.

    Args:
        api: The Hub.
        repo_id: The kernel.
        revision: Which.
        files: The paths that it holds.
    """
    found = []
    for path, key in ((YANKED, "reason"), (STATUS, "destination")):
        value = None
        if path in files:
            try:
                value = str(tomli.loads(fetch(api, repo_id, revision, path).decode("utf-8")).get(key))
            except (tomli.TOMLDecodeError, UnicodeDecodeError):
                value = f"(its {path} cannot be read)"
        found.append(value)
    return found[0], found[1]


def fetch(api: HfApi, repo_id: str, revision: str, path: str) -> bytes:
    """One file of a repository, around every cache."""
    with tempfile.TemporaryDirectory(prefix="kernelpress-") as scratch:
        file = api.hf_hub_download(repo_id, path, repo_type=TYPE, revision=revision, local_dir=scratch)
        return Path(file).read_bytes()


def plan_branch(
    api: HfApi, repo_id: str, name: str, at: Mapping[str, str], wanted: Mapping[str, bytes]
) -> BranchPlan:
    """What would change on a branch so that it holds ``wanted``; ``at`` are all branches and their commits."""
    base = at.get(name, at[MAIN])
    there = tree(api, repo_id, base)
    add = {
        path: data
        for path, data in wanted.items()
        if path not in there or not _same_content(there[path], data)
    }
    # The status speaks of what stood here before: a yanked build, or an address that has moved.
    delete = tuple(
        sorted(
            path
            for path in there
            if path not in wanted and (path.startswith("build/") or path in (STATUS, YANKED))
        )
    )
    if all(path.endswith(f"/{SIGNATURE}") for path in delete) and all(
        path in there and _same_but_provenance(api, repo_id, base, path, data)
        for path, data in add.items()
        if not path.endswith(f"/{SIGNATURE}")
    ):
        # Who rebuilds what is published and cannot sign it must not take the signature away; and a new
        # one over the same content is no reason to commit.
        add, delete = {}, ()
    held = {path: (content_id(entry), entry.size) for path, entry in there.items()}
    return BranchPlan(name, name in at, base, add, delete, held)


def _same_content(entry: RepoFile, data: bytes) -> bool:
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _same_but_provenance(api: HfApi, repo_id: str, revision: str, path: str, data: bytes) -> bool:
    if path.rpartition("/")[2] != METADATA:
        return False
    try:
        return without_provenance(fetch(api, repo_id, revision, path)) == without_provenance(data)
    except ValueError:
        return False


def _api(
    build: Build, repo_id: str, api: HfApi, at: Mapping[str, str], own: BranchPlan
) -> tuple[int | None, tuple[ApiChange, ...]]:
    """The version that readers of this one come from, and how its public API differs."""
    against = max((version for version in versions_of(at) if version <= build.spec.version), default=None)
    if against is None or own.unchanged:
        return None, ()
    base = at[f"v{against}"]
    paths = [path for path in tree(api, repo_id, base) if path.startswith("build/") and path.endswith(".py")]
    variants = sorted({path.split("/")[1] for path in paths})
    flat = next((name for name in variants if not name.endswith("-universal")), None) or next(
        iter(variants), None
    )
    if flat is None:
        return None, ()
    with tempfile.TemporaryDirectory(prefix="kernelpress-") as scratch:
        wanted = f"build/{flat}/*.py"
        api.snapshot_download(
            repo_id, repo_type=TYPE, revision=base, local_dir=scratch, allow_patterns=wanted
        )
        old = read_variant(Path(scratch, "build", flat))
    return against, compare(old, {file.path: file.data for file in build.variants[0].files})


def _build_of(held: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    return {path: content for path, (content, _) in held.items() if path.startswith("build/")}


def _objections(build: Build, repo_id: str, api: HfApi, branches: tuple[BranchPlan, ...]) -> tuple[str, ...]:
    found = []
    git = build.source.git
    for branch in branches:
        if branch.unchanged or branch.base is None:
            continue
        replaces = branch.exists and bool(_build_of(branch.held))
        if replaces and branch.name != MAIN and git is not None and git.dirty:
            found.append(
                f"{branch.name} is published and the sources differ from commit {git.commit[:12]}: commit them first"
            )
        yanked, moved = status_of(api, repo_id, branch.base, branch.held)
        if moved is not None:
            found.append(f"{branch.name} redirects its readers to {moved}: publish there")
        elif yanked is not None and branch.exists and branch.name != MAIN:
            found.append(f"{branch.name} was yanked ({yanked}): raise the version in build.toml")
    return tuple(found)


def _notes(build: Build) -> tuple[str, ...]:
    if build.source.git is None:
        return ("the sources are in no git repository, so nobody can tell later what this was built from",)
    if build.source.git.dirty:
        return (f"the sources differ from commit {build.source.git.commit[:12]}",)
    return ()
