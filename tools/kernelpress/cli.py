"""The command line: reads arguments, calls a step, prints what it returns."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kernelpress import cli_hub
from kernelpress.cli_shared import Directory, console
from kernelpress.errors import KernelpressError

# Each command imports its step when it runs: a build must not wait for the Hub's client, nor for torch.

app = typer.Typer(
    help="Build, check and publish Python/Triton kernels on the Hugging Face Kernel Hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    out = console()
    out.print(table)
    out.print(f"[green]built[/] {escape(str(made.directory))}  tree {made.tree_hash[:16]}")


@app.command()
def check(directory: Directory = Path()) -> None:
    """Check the build in build/: metadata, digests, and that each variant loads in a clean process."""
    from kernelpress.check import check as examine

    found = examine(directory / "build")
    out = console()
    for each in found:
        style = "red" if each.severity == "error" else "yellow"
        out.print(f"[{style}]{each.severity}[/] {escape(str(each))}", soft_wrap=True)
    errors = sum(each.severity == "error" for each in found)
    if errors:
        out.print(f"[red]{errors} error{'s' * (errors > 1)}[/]")
        raise typer.Exit(1)
    out.print("[green]the build loads and is whole[/]")


app.add_typer(cli_hub.commands)


def main() -> None:
    """Entry point: one message and a non-zero status for whatever the user can mend."""
    try:
        app(standalone_mode=True)
    except KernelpressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
