"""The commands that run a Hub of one's own and look after it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kernelpress.cli_shared import NOTHING_TO_DO, console

commands = typer.Typer()
token = typer.Typer(help="Tokens of a Hub of your own.", no_args_is_help=True)
commands.add_typer(token, name="token")

Root = Annotated[Path, typer.Option(help="The Hub's directory.")]
TokensRoot = Annotated[Path | None, typer.Option(help="The Hub's directory; default: .hub, if there is one.")]


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


@commands.command()
def clean(root: Root = Path(".hub")) -> None:
    """Remove what no branch, tag or pull request of a Hub of your own leads to; stop the Hub first."""
    from kernelpress.localhub import clean as do

    done = do(root)
    out = console()
    for fault in done.faults:
        out.print(f"[yellow]left alone[/] {escape(fault)}", soft_wrap=True)
    out.print(f"removed {done.objects} objects and {done.large_files} large files, {done.bytes:,} bytes")


@token.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="Whose token it is.")],
    root: TokensRoot = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Do not allow writing.")] = False,
    organization: Annotated[
        list[str] | None, typer.Option(metavar="ORG", help="Only for this one; may be given several times.")
    ] = None,
) -> None:
    """Make a token; it is shown this once. From then on writing to the Hub takes one."""
    from kernelpress.localhub import create_token as make

    where = _root(root, new=True)
    print(make(where, name, "read" if read_only else "write", organization or ()))


@token.command("list")
def list_tokens(root: TokensRoot = None) -> None:
    """List whose tokens there are; the tokens themselves are not kept."""
    from kernelpress.localhub import list_tokens as read

    table = Table("name", "scope", "organizations", "sha256", box=None, pad_edge=False)
    for each in read(_root(root)):
        table.add_row(each.name, each.scope, " ".join(each.organizations) or "all", each.sha256[:12])
    console().print(table)


@token.command("revoke")
def revoke_token(
    name: Annotated[str, typer.Argument(help="Whose tokens to take back.")], root: TokensRoot = None
) -> None:
    """Take back every token of somebody, at once."""
    from kernelpress.localhub import revoke_tokens

    count = revoke_tokens(_root(root), name)
    console().print(f"{count} token{'s' * (count != 1)} revoked")
    if not count:
        raise typer.Exit(NOTHING_TO_DO)


def _root(given: Path | None, *, new: bool = False) -> Path:
    """The directory of a Hub; a new one is made only where it was named, and never without a word."""
    from kernelpress.errors import HubError

    root = given or Path(".hub")
    if not root.is_dir():
        if given is None or not new:
            raise HubError("there is no Hub here; name its directory with --root", path=root)
        # Standard output is for the token alone.
        print(f"made {root} for a new Hub; serve it with --root {root}", file=sys.stderr)
    return root
