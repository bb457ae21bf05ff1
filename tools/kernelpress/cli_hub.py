"""The commands that talk to a Hub or are one: they read arguments, call a step, print what it returns."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kernelpress.cli_shared import Directory, console

if TYPE_CHECKING:
    from kernelpress.plan import BranchPlan, Plan
    from kernelpress.release import Release

commands = typer.Typer()
token = typer.Typer(help="Tokens of a Hub of your own.", no_args_is_help=True)
commands.add_typer(token, name="token")

NOTHING_TO_DO = 3

Endpoint = Annotated[str | None, typer.Option(help="The Hub's address; default: HF_ENDPOINT.")]
RepoOption = Annotated[str | None, typer.Option(help="organization/name; default: build.toml's.")]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="organization/name")]
OutputJson = Annotated[bool, typer.Option("--output-json", help="Print JSON, and nothing else.")]
Root = Annotated[Path, typer.Option(help="The Hub's directory.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]


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
    because somebody else was faster, 1 failed, 2 wrong usage.
    """
    from kernelpress.hubs import hub
    from kernelpress.release import release
    from kernelpress.sign import sign
    from kernelpress.spec import load_spec
    from kernelpress.variant import build as make

    if dry_run:
        _show_plan(directory, repo_id, endpoint, output_json)
        return
    made = make(load_spec(directory))
    signed = sign(made)
    done = release(made, repo_id, hub(endpoint), private=private, force=force, create_pr=create_pr, say=_say)
    if output_json:
        print(json.dumps(asdict(done) | {"signed": signed}, indent=2))
    else:
        _print_release(done, signed)
    if not done.published.changed:
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


def _show_plan(directory: Path, repo_id: str | None, endpoint: str | None, output_json: bool) -> None:
    from kernelpress.hubs import RefusedError, checked_repo_id, hub
    from kernelpress.plan import plan
    from kernelpress.spec import load_spec
    from kernelpress.variant import build as make

    made = make(load_spec(directory))
    todo = plan(made, checked_repo_id(repo_id or made.spec.repo_id), hub(endpoint))
    if output_json:
        print(json.dumps(_plan_json(todo), indent=2))
    else:
        _print_plan(todo)
    if todo.objections:
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
        "objections": todo.objections,
        "notes": todo.notes,
    }


def _print_plan(todo: Plan) -> None:
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
        out.print(f"[red]refused[/] {escape(objection)}", soft_wrap=True)


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


def _print_release(done: Release, signed: tuple[str, ...]) -> None:
    out, published = console(), done.published
    for branch in published.branches:
        if branch.changed:
            what = (
                f"[green]published[/] {branch.added} files changed, {branch.deleted} removed, "
                f"commit {branch.commit[:12]}"
            )
        else:
            what = f"[yellow]unchanged[/] nothing to commit, at {branch.commit[:12]}"
        out.print(f"{branch.name:<6} {what}", soft_wrap=True)
    if published.newer is not None:
        out.print(f"main   [yellow]kept[/] it holds the newer version {published.newer}")
    if published.pull_request is not None:
        out.print(f"pull request {escape(published.pull_request)}", soft_wrap=True)
        out.print("publish again once it is merged: that makes the version's branch", soft_wrap=True)
    for each in published.overridden:
        out.print(f"[yellow]forced[/] {escape(each)}", soft_wrap=True)
    if published.changed:
        for note in published.notes:
            out.print(f"note   {escape(note)}", soft_wrap=True)
        out.print("signed " + (", ".join(signed) or "no: this environment offers no identity to sign with"))
    if done.seen is not None:
        seen = done.seen
        called = f", called {seen.called}" if seen.called else ", no operator took made-up arguments"
        out.print(
            f"[green]verified[/] in {seen.seconds:.1f} s: digests hold, loaded {', '.join(seen.loaded)}{called}",
            soft_wrap=True,
        )
        if seen.skipped:
            out.print(
                f"       not loaded, for want of the hardware: {', '.join(seen.skipped)}", soft_wrap=True
            )
    out.print(escape(published.url), soft_wrap=True)


@commands.command()
def versions(repo: Repo, endpoint: Endpoint = None, output_json: OutputJson = False) -> None:
    """List the versions of a kernel on the Hub."""
    from kernelpress.history import info as look
    from kernelpress.hubs import hub

    found = look(hub(endpoint), repo)
    if output_json:
        print(json.dumps([asdict(each) for each in found.versions], indent=2))
        return
    table = Table("version", "commit", "date", "variants", "bytes", "state", box=None, pad_edge=False)
    for each in found.versions:
        state = f"yanked: {each.yanked}" if each.yanked else f"-> {each.redirect}" if each.redirect else ""
        main = " (main)" if each.version == found.main_version else ""
        table.add_row(
            f"v{each.version}{main}", each.commit[:12], each.date[:10],
            " ".join(each.variants), f"{each.size:,}", escape(state),
        )  # fmt: skip
    console().print(table)


@commands.command()
def info(repo: Repo, endpoint: Endpoint = None, output_json: OutputJson = False) -> None:
    """Describe a kernel on the Hub: where it is, which version main holds, what each version is built from."""
    from kernelpress.history import info as look
    from kernelpress.hubs import hub

    found = look(hub(endpoint), repo)
    if output_json:
        print(json.dumps(asdict(found), indent=2))
        return
    out = console()
    visibility = "private" if found.private else "public"
    main = "no build" if found.main_version is None else f"version {found.main_version}"
    out.print(f"{escape(found.url)}  {visibility}, main holds {main}", soft_wrap=True)
    for each in found.versions:
        signed = "signed" if each.signed else "unsigned"
        out.print(
            f"v{each.version}  {each.commit}  from {each.source or 'unknown sources'}  {signed}",
            soft_wrap=True,
        )
        if each.yanked:
            out.print(f"    [red]yanked[/] {escape(each.yanked)}", soft_wrap=True)
        if each.redirect:
            out.print(f"    [yellow]redirects[/] to {escape(each.redirect)}", soft_wrap=True)


@commands.command()
def rollback(
    repo: Repo,
    to: Annotated[str, typer.Option(metavar="REV", help="The commit whose files to go back to.")],
    branch: Annotated[str | None, typer.Option(help="Which branch; default: that of REV's version.")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Give a branch the files of an earlier commit, in a new commit."""
    from kernelpress.history import rollback as back
    from kernelpress.history import version_at
    from kernelpress.hubs import hub

    api = hub(endpoint)
    name = branch or f"v{version_at(api, repo, to)}"
    commit = back(api, repo, name, to)
    console().print(f"{name}  [green]holds[/] what {escape(to)} holds, commit {commit[:12]}", soft_wrap=True)


@commands.command()
def yank(
    repo: Repo,
    version: Annotated[str, typer.Argument(metavar="vN", help="The version.")],
    reason: Annotated[str, typer.Option(help="Why; its readers are told.")],
    endpoint: Endpoint = None,
) -> None:
    """Stop new readers of a version, and tell them why; who is locked to a commit still gets its files."""
    from kernelpress.history import yank as do
    from kernelpress.hubs import hub

    number = version.removeprefix("v")
    if not (number.isascii() and number.isdigit()):
        raise typer.BadParameter("name a version, like v1")
    _print_done(do(hub(endpoint), repo, int(number), reason), "yanked")


@commands.command()
def redirect(
    repo: Repo,
    new: Annotated[str, typer.Argument(metavar="NEW", help="Where readers are sent: organization/name.")],
    endpoint: Endpoint = None,
) -> None:
    """Send the readers of a kernel to another repository that has the same versions."""
    from kernelpress.history import redirect as do
    from kernelpress.hubs import hub

    _print_done(do(hub(endpoint), repo, new), "redirected")


def _print_done(done: dict[str, str], what: str) -> None:
    out = console()
    for name, commit in done.items():
        out.print(f"{name:<6} [green]{what}[/] commit {commit[:12]}")
    if not done:
        out.print(f"[yellow]nothing to do[/]: it is {what} already")
        raise typer.Exit(NOTHING_TO_DO)


@commands.command()
def bundle(
    repo: Repo,
    output: Annotated[Path, typer.Option("--output", "-o", help="The archive to write.")],
    version: Annotated[list[int] | None, typer.Option(help="Only this version; may be given again.")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Put a kernel's versions into one archive, for machines without a network."""
    from kernelpress.bundle import bundle as do
    from kernelpress.hubs import hub

    done = do(hub(endpoint), repo, output, version or ())
    console().print(f"[green]bundled[/] {', '.join(done.commits)} into {escape(str(output))}", soft_wrap=True)


@commands.command()
def unbundle(
    archive: Annotated[Path, typer.Argument(help="What bundle wrote.")],
    into: Annotated[Path | None, typer.Option(help="A new directory to unpack it to.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Put it on a Hub as organization/name.")] = None,
    endpoint: Endpoint = None,
    private: Private = False,
) -> None:
    """Unpack an archive for LOCAL_KERNELS (--into), or put it on another Hub (--repo-id or --endpoint)."""
    from kernelpress.bundle import unbundle as unpack
    from kernelpress.bundle import upload
    from kernelpress.hubs import hub

    if into is not None:
        done = unpack(archive, into)
        for name in done.commits:
            console().print(escape(f"LOCAL_KERNELS={done.repo_id}={(into / name).resolve()}"), soft_wrap=True)
    elif repo_id is not None or endpoint is not None:
        _print_done(upload(archive, hub(endpoint), repo_id, private=private), "published")
    else:
        raise typer.BadParameter("say where to: --into DIRECTORY, or --repo-id and --endpoint")


@commands.command()
def serve(
    root: Annotated[Path, typer.Option(help="Where the Hub keeps its repositories.")] = Path(".hub"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8321,
    trust: Annotated[
        list[str] | None, typer.Option(metavar="ORG", help="A trusted publisher; may be given several times.")
    ] = None,
    open_writes: Annotated[
        bool, typer.Option("--open", help="Take writes without a token until one is made; on loopback only.")
    ] = False,
) -> None:
    """Run a Hub of your own for the clients of the Hugging Face Hub."""
    from kernelpress.localhub import serve as run

    run(root, host, port, trust or [], open_writes=open_writes)


@commands.command()
def fsck(root: Root = Path(".hub")) -> None:
    """Check everything that a Hub of your own keeps against its names and digests."""
    from kernelpress.localhub import fsck as examine

    done = examine(root)
    out = console()
    for fault in done.faults:
        out.print(f"[red]fault[/] {escape(fault)}", soft_wrap=True)
    out.print(f"{done.repositories} repositories, {done.objects} objects, {done.large_files} large files")
    if done.faults:
        raise typer.Exit(1)
    out.print("[green]all is well[/]")


@token.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="Whose token it is.")],
    root: Root = Path(".hub"),
    read_only: Annotated[bool, typer.Option("--read-only", help="Do not allow writing.")] = False,
    organization: Annotated[
        list[str] | None, typer.Option(metavar="ORG", help="Only for this one; may be given several times.")
    ] = None,
) -> None:
    """Make a token; it is shown this once. From then on writing to the Hub takes one."""
    from kernelpress.localhub import create_token as make

    print(make(root, name, "read" if read_only else "write", organization or ()))


@token.command("list")
def list_tokens(root: Root = Path(".hub")) -> None:
    """List whose tokens there are; the tokens themselves are not kept."""
    from kernelpress.localhub import list_tokens as read

    table = Table("name", "scope", "organizations", "sha256", box=None, pad_edge=False)
    for each in read(root):
        table.add_row(each.name, each.scope, " ".join(each.organizations) or "all", each.sha256[:12])
    console().print(table)


@token.command("revoke")
def revoke_token(
    name: Annotated[str, typer.Argument(help="Whose tokens to take back.")], root: Root = Path(".hub")
) -> None:
    """Take back every token of somebody, at once."""
    from kernelpress.localhub import revoke_tokens

    count = revoke_tokens(root, name)
    console().print(f"{count} token{'s' * (count != 1)} revoked")
    if not count:
        raise typer.Exit(NOTHING_TO_DO)


def _say(text: str) -> None:
    # Standard output is for the result alone.
    print(text, file=sys.stderr)
