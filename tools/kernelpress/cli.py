"""The command line: reads arguments, calls a step, prints what it returns."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kernelpress.errors import KernelpressError

# Each command imports its step when it runs: a build must not wait for the Hub's client, nor for torch.

app = typer.Typer(
    help="Build, check and publish Python/Triton kernels on the Hugging Face Kernel Hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
token = typer.Typer(help="Tokens of a Hub of your own.", no_args_is_help=True)
app.add_typer(token, name="token")
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory that holds build.toml.")]


def _version(value: bool) -> None:
    if value:
        print(f"kernelpress {installed_version('kernelpress')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command()
def build(directory: Directory = Path()) -> None:
    """Build every variant of a kernel into build/."""
    from kernelpress.spec import load_spec
    from kernelpress.variant import build as make

    made = make(load_spec(directory))
    table = Table("variant", "id", "files", box=None, pad_edge=False)
    for variant in made.variants:
        table.add_row(variant.name, variant.id, str(len(variant.files)))
    console = _console()
    console.print(table)
    console.print(f"[green]built[/] {escape(str(made.directory))}  tree {made.tree_hash[:16]}")


@app.command()
def check(directory: Directory = Path()) -> None:
    """Check the build in build/: metadata, digests, and that each variant loads in a clean process."""
    from kernelpress.check import check as examine

    found = examine(directory / "build")
    console = _console()
    for each in found:
        style = "red" if each.severity == "error" else "yellow"
        console.print(f"[{style}]{each.severity}[/] {escape(str(each))}", soft_wrap=True)
    errors = sum(each.severity == "error" for each in found)
    if errors:
        console.print(f"[red]{errors} error{'s' * (errors > 1)}[/]")
        raise typer.Exit(1)
    console.print("[green]the build loads and is whole[/]")


@app.command()
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
    console = _console()
    for each in done.branches:
        if each.changed:
            what = f"[green]published[/] {each.added} files changed, {each.deleted} removed, commit {each.commit[:12]}"
        else:
            what = f"[yellow]unchanged[/] nothing to commit, at {each.commit[:12]}"
        console.print(f"{each.name:<6} {what}", soft_wrap=True)
    if done.newer is not None:
        console.print(f"main   [yellow]kept[/] it holds the newer version {done.newer}")
    console.print(escape(done.url), soft_wrap=True)


@app.command()
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


def main() -> None:
    """Entry point: one message and a non-zero status for whatever the user can mend."""
    try:
        app(standalone_mode=True)
    except KernelpressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _console() -> Console:
    return Console(highlight=False)
