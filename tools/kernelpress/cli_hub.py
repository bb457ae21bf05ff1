"""The commands that talk to a Hub or are one: they read arguments, call a step, print what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kernelpress.cli_shared import Directory, console

commands = typer.Typer()
token = typer.Typer(help="Tokens of a Hub of your own.", no_args_is_help=True)
commands.add_typer(token, name="token")


@commands.command()
def publish(
    directory: Directory = Path(),
    repo_id: Annotated[str | None, typer.Option(help="organization/name; default: build.toml's.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="The Hub's address; default: HF_ENDPOINT.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Build a kernel and put it on its version's branch of the Hub."""
    from kernelpress.publish import hub
    from kernelpress.publish import publish as put
    from kernelpress.spec import load_spec
    from kernelpress.variant import build as make

    done = put(make(load_spec(directory)), repo_id, hub(endpoint), private=private)
    out = console()
    for each in done.branches:
        if each.changed:
            what = f"[green]published[/] {each.added} files changed, {each.deleted} removed, commit {each.commit[:12]}"
        else:
            what = f"[yellow]unchanged[/] nothing to commit, at {each.commit[:12]}"
        out.print(f"{each.name:<6} {what}", soft_wrap=True)
    if done.newer is not None:
        out.print(f"main   [yellow]kept[/] it holds the newer version {done.newer}")
    out.print(escape(done.url), soft_wrap=True)


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
) -> None:
    """Run a Hub of your own for the clients of the Hugging Face Hub."""
    from kernelpress.localhub import serve as run

    run(root, host, port, trust or [])


@token.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="Whose token it is.")],
    root: Annotated[Path, typer.Option(help="The Hub's directory.")] = Path(".hub"),
    read_only: Annotated[bool, typer.Option("--read-only", help="Do not allow writing.")] = False,
) -> None:
    """Make a token; it is shown this once. From then on writing to the Hub takes one."""
    from kernelpress.localhub import create_token as make

    print(make(root, name, "read" if read_only else "write"))
