"""The commands that plan and publish: they read arguments, call a step, print what it returns."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kernelpress.cli.options import NOTHING_TO_DO, Directory, Endpoint, OutputJson, Private, console, say

if TYPE_CHECKING:
    from kernelpress.publish.plan import BranchPlan, Plan
    from kernelpress.publish.release import Release

commands = typer.Typer()

RepoOption = Annotated[str | None, typer.Option(help="organization/name; default: build.toml's.")]


@commands.command()
def publish(
    directory: Directory = Path(),
    repo_id: RepoOption = None,
    endpoint: Endpoint = None,
    private: Private = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Override what forbids it; it is named.")] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request on main instead.")
    ] = False,
    output_json: OutputJson = False,
) -> None:
    """Build a kernel, put it on its version's branch of the Hub, and use it from there as a consumer would.

    Exit status: 0 published (or a dry run that found something to do), 3 nothing to do, 4 refused by a rule or
    because somebody else was faster, 1 failed (so does what cannot be built), 2 wrong usage.
    """
    from kernelpress.builder.build import build
    from kernelpress.hub.client import hub
    from kernelpress.publish.publish import PublishOptions
    from kernelpress.publish.release import release
    from kernelpress.publish.sign import sign
    from kernelpress.spec.load import load_spec

    if dry_run:
        _show_plan(directory, repo_id, endpoint, output_json, force=force)
        return
    kernel = build(load_spec(directory))
    signed = sign(kernel)
    options = PublishOptions(private=private, force=force, create_pr=create_pr)
    result = release(kernel, repo_id, hub(endpoint), options, say=say)
    if output_json:
        print(json.dumps(asdict(result) | {"signed": signed}, indent=2))
    else:
        _print_release(result, signed)
    if not result.published.changed:
        raise typer.Exit(NOTHING_TO_DO)


@commands.command()
def diff(
    directory: Directory = Path(),
    repo_id: RepoOption = None,
    endpoint: Endpoint = None,
    output_json: OutputJson = False,
) -> None:
    """Show what publishing would change, and change nothing; the same as `publish --dry-run`."""
    _show_plan(directory, repo_id, endpoint, output_json)


def _show_plan(
    directory: Path, repo_id: str | None, endpoint: str | None, output_json: bool, *, force: bool = False
) -> None:
    from kernelpress.builder.build import prepare
    from kernelpress.hub.client import RefusedError, checked_repo_id, hub
    from kernelpress.publish.plan import plan
    from kernelpress.spec.load import load_spec

    kernel = prepare(load_spec(directory))
    todo = plan(kernel, checked_repo_id(repo_id or kernel.spec.repo_id), hub(endpoint))
    if output_json:
        print(json.dumps(_plan_json(todo) | {"forced": force}, indent=2))
    else:
        _print_plan(todo, force)
    if todo.faults or (todo.objections and not force):
        raise typer.Exit(RefusedError.exit_code)
    if todo.unchanged:
        raise typer.Exit(NOTHING_TO_DO)


def _plan_json(todo: Plan) -> dict[str, object]:
    branches = [
        {
            "name": branch.name,
            "exists": branch.exists,
            "base": branch.base,
            "unchanged": branch.unchanged,
            "changes": [asdict(change) for change in branch.changes],
        }
        for branch in todo.branches
    ]
    return {
        "repo_id": todo.repo_id,
        "version": todo.version,
        "creates": todo.creates,
        "branches": branches,
        "newer": todo.newer,
        "against": todo.against,
        "api": [asdict(change) for change in todo.api],
        "implied": todo.implied,
        "faults": todo.faults,
        "objections": todo.objections,
        "notes": todo.notes,
    }


def _print_plan(todo: Plan, force: bool) -> None:
    out = console()
    if todo.creates:
        out.print(f"{escape(todo.repo_id)} [green]would be created[/]", soft_wrap=True)
    for branch in todo.branches:
        _print_branch(branch)
    if todo.newer is not None:
        out.print(f"main   [yellow]kept[/] it holds the newer version {todo.newer}")
    for change in todo.api:
        style = "red" if change.effect == "breaks" else "green"
        out.print(f"api    [{style}]{change.effect}[/] {escape(str(change))}", soft_wrap=True)
    if todo.against is not None:
        out.print(f"api    compared with v{todo.against}; asks for version {todo.implied} or later")
    for note in todo.notes:
        out.print(f"note   {escape(note)}", soft_wrap=True)
    for objection in todo.objections:
        word = "[yellow]forced[/]" if force else "[red]refused[/]"
        out.print(f"{word} {escape(objection)}", soft_wrap=True)
    for fault in todo.faults:
        out.print(f"[red]refused[/] {escape(fault)}", soft_wrap=True)


def _print_branch(branch: BranchPlan) -> None:
    out = console()
    changes = branch.changes
    if branch.unchanged:
        out.print(f"{branch.name:<6} [yellow]unchanged[/] nothing to commit, at {(branch.base or '')[:12]}")
        return
    where = f"on {(branch.base or '')[:12]}" if branch.exists else "new branch"
    size = sum(change.after or 0 for change in changes)
    out.print(f"{branch.name:<6} {where}, {len(changes)} files, {size:,} bytes")
    for change in changes:
        style = {"added": "green", "changed": "yellow", "removed": "red"}[change.kind]
        sizes = " -> ".join(f"{size:,}" for size in (change.before, change.after) if size is not None)
        out.print(f"       [{style}]{change.kind:<7}[/] {escape(change.path)}  {sizes}", soft_wrap=True)


def _print_release(release: Release, signed: tuple[str, ...]) -> None:
    out, published = console(), release.published
    for branch in published.branches:
        if branch.changed:
            outcome = (
                f"[green]published[/] {branch.added} files changed, {branch.deleted} removed, "
                f"commit {branch.commit[:12]}"
            )
        else:
            outcome = f"[yellow]unchanged[/] nothing to commit, at {branch.commit[:12]}"
        out.print(f"{branch.name:<6} {outcome}", soft_wrap=True)
    if published.newer is not None:
        out.print(f"main   [yellow]kept[/] it holds the newer version {published.newer}")
    if published.pull_request is not None:
        unchanged = "" if published.opened else " [yellow]unchanged[/] it holds this build already"
        out.print(f"pull request {escape(published.pull_request)}{unchanged}", soft_wrap=True)
        out.print("publish again once it is merged: that makes the version's branch", soft_wrap=True)
    for objection in published.overridden:
        out.print(f"[yellow]forced[/] {escape(objection)}", soft_wrap=True)
    if published.changed:
        for note in published.notes:
            out.print(f"note   {escape(note)}", soft_wrap=True)
        out.print("signed " + (", ".join(signed) or "no: this environment offers no identity to sign with"))
    verification = release.seen
    if verification is not None:
        called = (
            f", called {verification.called}"
            if verification.called
            else ", no operator took made-up arguments"
        )
        loaded = f", loaded {', '.join(verification.loaded)}{called}" if verification.loaded else ""
        out.print(f"[green]verified[/] in {verification.seconds:.1f} s: digests hold{loaded}", soft_wrap=True)
        if verification.skipped:
            out.print(
                f"       not loaded, for want of the hardware: {', '.join(verification.skipped)}",
                soft_wrap=True,
            )
    out.print(escape(published.url), soft_wrap=True)
