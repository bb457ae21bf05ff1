"""The commands about what is published: they read arguments, call a step, print what it returns."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kernelpress.cli_shared import NOTHING_TO_DO, Endpoint, OutputJson, Private, console

commands = typer.Typer()

Repo = Annotated[str, typer.Argument(metavar="REPO", help="organization/name")]


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
    from kernelpress.hubs import hub
    from kernelpress.upload import upload

    if into is not None and (repo_id is not None or endpoint is not None or private):
        raise typer.BadParameter(
            "--into unpacks to a directory and reaches no Hub; give it alone, or leave it out"
        )
    if into is not None:
        done = unpack(archive, into)
        for name in done.commits:
            console().print(escape(f"LOCAL_KERNELS={done.repo_id}={(into / name).resolve()}"), soft_wrap=True)
    elif repo_id is not None or endpoint is not None:
        _print_done(upload(archive, hub(endpoint), repo_id, private=private), "published")
    else:
        raise typer.BadParameter("say where to: --into DIRECTORY, or --repo-id and --endpoint")
