"""What the command-line modules have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# Exit status.
NOTHING_TO_DO = 3

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory that holds build.toml.")]
Endpoint = Annotated[str | None, typer.Option(help="The Hub's address; default: HF_ENDPOINT.")]
OutputJson = Annotated[bool, typer.Option("--output-json", help="Print JSON, and nothing else.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]


def console() -> Console:
    """Standard output, without colours guessed from what is printed."""
    return Console(highlight=False)
