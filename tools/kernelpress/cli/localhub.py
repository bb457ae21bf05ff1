"""The commands that run a Hub of one's own and look after it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich.markup import escape
from rich.table import Table

from kernelpress.cli.options import NOTHING_TO_DO, console
from kernelpress.errors import HubError

commands = typer.Typer()
token = typer.Typer(help="Tokens of a Hub of your own.", no_args_is_help=True)
commands.add_typer(token, name="token")

Root = Annotated[Path, typer.Option(help="The Hub's directory.")]
TokensRoot = Annotated[Path | None, typer.Option(help="The Hub's directory; default: .hub, if there is one.")]
Options = ParamSpec("Options")


def report_hub_errors(command: Callable[Options, None]) -> Callable[Options, None]:
    """Make the Hub's errors, which know nothing of kernelpress, into ones that the command line reports."""

    @wraps(command)
    def run(*arguments: Options.args, **options: Options.kwargs) -> None:
        import localhub

        try:
            command(*arguments, **options)
        except localhub.HubError as error:
            raise HubError(str(error)) from error

    return run


@commands.command()
@report_hub_errors
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
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every request.")] = False,
) -> None:
    """Run a Hub of your own for the clients of the Hugging Face Hub."""
    import localhub

    localhub.serve(root, host, port, trust or [], open_writes=open_writes, verbose=verbose)


@commands.command()
@report_hub_errors
def fsck(root: Root = Path(".hub")) -> None:
    """Check everything that a Hub of your own keeps against its names and digests."""
    import localhub

    report = localhub.fsck(root)
    out = console()
    for fault in report.faults:
        out.print(f"[red]fault[/] {escape(fault)}", soft_wrap=True)
    out.print(
        f"{report.repositories} repositories, {report.objects} objects, {report.large_files} large files"
    )
    if report.faults:
        raise typer.Exit(1)
    out.print("[green]all is well[/]")


@commands.command()
@report_hub_errors
def clean(root: Root = Path(".hub")) -> None:
    """Remove what no branch, tag or pull request of a Hub of your own leads to; stop the Hub first."""
    import localhub

    report = localhub.clean(root)
    out = console()
    for fault in report.faults:
        out.print(f"[yellow]left alone[/] {escape(fault)}", soft_wrap=True)
    out.print(
        f"removed {report.objects} objects and {report.large_files} large files, {report.bytes:,} bytes"
    )


@token.command("create")
@report_hub_errors
def create_token(
    name: Annotated[str, typer.Argument(help="Whose token it is.")],
    root: TokensRoot = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Do not allow writing.")] = False,
    organization: Annotated[
        list[str] | None, typer.Option(metavar="ORG", help="Only for this one; may be given several times.")
    ] = None,
) -> None:
    """Make a token; it is shown this once. From then on writing to the Hub takes one."""
    import localhub

    hub = _root(root, new=True)
    print(localhub.create_token(hub, name, "read" if read_only else "write", organization or ()))


@token.command("list")
@report_hub_errors
def list_tokens(root: TokensRoot = None) -> None:
    """List whose tokens there are; the tokens themselves are not kept."""
    import localhub

    table = Table("name", "scope", "organizations", "sha256", box=None, pad_edge=False)
    for item in localhub.list_tokens(_root(root)):
        table.add_row(item.name, item.scope, " ".join(item.organizations) or "all", item.sha256[:12])
    console().print(table)


@token.command("revoke")
@report_hub_errors
def revoke_token(
    name: Annotated[str, typer.Argument(help="Whose tokens to take back.")], root: TokensRoot = None
) -> None:
    """Take back every token of somebody, at once."""
    import localhub

    count = localhub.revoke_tokens(_root(root), name)
    console().print(f"{count} token{'s' * (count != 1)} revoked")
    if not count:
        raise typer.Exit(NOTHING_TO_DO)


def _root(option: Path | None, *, new: bool = False) -> Path:
    """The directory of a Hub; a new one is made only where it was named, and never without a word."""
    root = option or Path(".hub")
    if not root.is_dir():
        if option is None or not new:
            raise HubError("there is no Hub here; name its directory with --root", path=root)
        # Standard output is for the token alone.
        print(f"made {root} for a new Hub; serve it with --root {root}", file=sys.stderr)
    return root
