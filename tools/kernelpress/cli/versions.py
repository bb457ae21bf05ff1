"""The commands about versions on a Hub: they read arguments, call a step, print what it returns."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kernelpress.cli.options import NOTHING_TO_DO, Endpoint, OutputJson, Private, console

commands = typer.Typer()

Repo = Annotated[str, typer.Argument(metavar="REPO", help="organization/name")]


@commands.command()
def versions(repo: Repo, endpoint: Endpoint = None, output_json: OutputJson = False) -> None:
    """List the versions of a kernel on the Hub."""
    from kernelpress.hub.client import hub
    from kernelpress.versions.info import info

    repository = info(hub(endpoint), repo)
    if output_json:
        print(json.dumps([asdict(version) for version in repository.versions], indent=2))
        return
    table = Table("version", "commit", "date", "variants", "bytes", "state", box=None, pad_edge=False)
    for version in repository.versions:
        state = (
            f"yanked: {version.yanked}"
            if version.yanked
            else f"-> {version.redirect}"
            if version.redirect
            else ""
        )
        main = " (main)" if version.version == repository.main_version else ""
        table.add_row(
            f"v{version.version}{main}", version.commit[:12], version.date[:10],
            " ".join(version.variants), f"{version.size:,}", escape(state),
        )  # fmt: skip
    console().print(table)


@commands.command()
def info(repo: Repo, endpoint: Endpoint = None, output_json: OutputJson = False) -> None:
    """Describe a kernel on the Hub: where it is, which version main holds, what each version is built from."""
    from kernelpress.hub.client import hub
    from kernelpress.versions.info import info

    repository = info(hub(endpoint), repo)
    if output_json:
        print(json.dumps(asdict(repository), indent=2))
        return
    out = console()
    visibility = "private" if repository.private else "public"
    main = "no build" if repository.main_version is None else f"version {repository.main_version}"
    out.print(f"{escape(repository.url)}  {visibility}, main holds {main}", soft_wrap=True)
    for version in repository.versions:
        signed = "signed" if version.signed else "unsigned"
        out.print(
            f"v{version.version}  {version.commit}  from {version.source or 'unknown sources'}  {signed}",
            soft_wrap=True,
        )
        if version.yanked:
            out.print(f"    [red]yanked[/] {escape(version.yanked)}", soft_wrap=True)
        if version.redirect:
            out.print(f"    [yellow]redirects[/] to {escape(version.redirect)}", soft_wrap=True)


@commands.command()
def rollback(
    repo: Repo,
    to: Annotated[str, typer.Option(metavar="REV", help="The commit whose files to go back to.")],
    branch: Annotated[str | None, typer.Option(help="Which branch; default: that of REV's version.")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Give a branch the files of an earlier commit, in a new commit."""
    from kernelpress.hub.client import hub
    from kernelpress.versions.rollback import rollback

    name, commit = rollback(hub(endpoint), repo, to, branch)
    console().print(f"{name}  [green]holds[/] what {escape(to)} holds, commit {commit[:12]}", soft_wrap=True)


@commands.command()
def yank(
    repo: Repo,
    version: Annotated[str, typer.Argument(metavar="vN", help="The version.")],
    reason: Annotated[str, typer.Option(help="Why; its readers are told.")],
    endpoint: Endpoint = None,
) -> None:
    """Stop new readers of a version, and tell them why; who is locked to a commit still gets its files."""
    from kernelpress.hub.client import hub
    from kernelpress.versions.yank import yank

    number = version.removeprefix("v")
    if not (number.isascii() and number.isdigit()):
        raise typer.BadParameter("name a version, like v1")
    _print_commits(yank(hub(endpoint), repo, int(number), reason), "yanked")


@commands.command()
def redirect(
    repo: Repo,
    new: Annotated[str, typer.Argument(metavar="NEW", help="Where readers are sent: organization/name.")],
    endpoint: Endpoint = None,
) -> None:
    """Send the readers of a kernel to another repository that has the same versions."""
    from kernelpress.hub.client import hub
    from kernelpress.versions.yank import redirect

    _print_commits(redirect(hub(endpoint), repo, new), "redirected")


def _print_commits(commits: dict[str, str], action: str) -> None:
    out = console()
    for branch, commit in commits.items():
        out.print(f"{branch:<6} [green]{action}[/] commit {commit[:12]}")
    if not commits:
        out.print(f"[yellow]nothing to do[/]: it is {action} already")
        raise typer.Exit(NOTHING_TO_DO)


@commands.command()
def bundle(
    repo: Repo,
    output: Annotated[Path, typer.Option("--output", "-o", help="The archive to write.")],
    version: Annotated[list[int] | None, typer.Option(help="Only this version; may be given again.")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Put a kernel's versions into one archive, for machines without a network."""
    from kernelpress.hub.client import hub
    from kernelpress.versions.bundle import bundle

    bundled = bundle(hub(endpoint), repo, output, version or ())
    console().print(
        f"[green]bundled[/] {', '.join(bundled.commits)} into {escape(str(output))}", soft_wrap=True
    )


@commands.command()
def unbundle(
    archive: Annotated[Path, typer.Argument(help="What bundle wrote.")],
    into: Annotated[Path | None, typer.Option(help="A new directory to unpack it to.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Put it on a Hub as organization/name.")] = None,
    endpoint: Endpoint = None,
    private: Private = False,
) -> None:
    """Unpack an archive for LOCAL_KERNELS (--into), or put it on another Hub (--repo-id or --endpoint)."""
    from kernelpress.hub.client import hub
    from kernelpress.versions.bundle import unbundle
    from kernelpress.versions.unbundle import upload

    if into is not None and (repo_id is not None or endpoint is not None or private):
        raise typer.BadParameter(
            "--into unpacks to a directory and reaches no Hub; give it alone, or leave it out"
        )
    if into is not None:
        unpacked = unbundle(archive, into)
        for name in unpacked.commits:
            console().print(
                escape(f"LOCAL_KERNELS={unpacked.repo_id}={(into / name).resolve()}"), soft_wrap=True
            )
    elif repo_id is not None or endpoint is not None:
        _print_commits(upload(archive, hub(endpoint), repo_id, private=private), "published")
    else:
        raise typer.BadParameter("say where to: --into DIRECTORY, or --repo-id and --endpoint")
